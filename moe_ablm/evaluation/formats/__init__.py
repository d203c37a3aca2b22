"""Tables of variants and tasks as others publish them."""
