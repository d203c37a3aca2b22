"""What experts specialise in: classes, nulls, specialists, slots, seeds."""
