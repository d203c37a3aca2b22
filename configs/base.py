"""Every key with its default and meaning. Other configs start from `get_config()` and change a few.

    python -m moe_ablm.train --config=configs/base.py --workdir=runs/base \
        --config.data.path=data/pairs --config.train.steps=1000
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The ESM-2 8M encoder, dense, on a prepared dataset."""
    c = ConfigDict()
    c.seed = 0  # of initial weights, order of the data, masks, dropout and jitter

    c.data = data = ConfigDict()
    data.path = placeholder(object)  # dataset directory, or several; None: simulate and cache one
    data.weights = placeholder(tuple)  # shares of several datasets; None: by their sizes
    data.simulated_pairs = 20_000  # size of that simulated dataset
    data.fraction = "full"  # quarter, half, full: nested subsets of the training split
    data.regime = "paired"  # shuffled, unpaired, unpaired:doubled, mixed:P, curriculum:sigmoid
    data.layout = "esm"  # esm: <cls>H<cls><cls>L<eos>; balm: <cls>H<eos>L<eos>; sep: one separator
    data.length = 256  # tokens a row; longer antibodies are left out, longer proteins cropped
    # padded; bucketed: batches of several lengths; packed: several sequences a row
    data.batching = "padded"
    data.buckets = (144, 240, 256)  # bucketed: the lengths; the last one is data.length
    data.mask = "uniform"  # uniform, span, cdr3:RATE, nongermline:RATE
    data.mask_rate = 0.15  # mean share of masked residues, with any policy

    c.model = model = ConfigDict()
    model.size = "8m"  # 8m, 35m, 150m, 350m, 650m; or any name, with the four sizes below
    model.layers = placeholder(int)
    model.d_model = placeholder(int)
    model.ffn = placeholder(int)
    model.heads = placeholder(int)
    model.token_dropout = True  # ESM-2: zero <mask> embeddings and rescale the rest

    model.activation = "gelu"  # of dense FFNs and experts: gelu (ESM-2), swiglu (BALM)
    model.tied = True  # the LM head's decoder is the embedding (ESM-2); False: its own (BALM)
    model.layer_norm_eps = 1e-5  # ESM-2's; the AbLM scaling study's models have 1e-12
    # positions with a learned vector each, added to the embedding (ESM-1b, RoBERTa); 0: rotary
    model.learned_positions = 0
    model.embedding_norm = False  # normalise the embedding before the first layer
    model.post_norm = False  # normalise after attention and FFN instead of before them (RoBERTa)
    # dropout rates in training (docs/training.md)
    model.attention_dropout = 0.0  # of attention weights
    model.hidden_dropout = 0.0  # of what attention and FFN add to the residual stream
    model.embedding_dropout = 0.0

    model.moe = moe = ConfigDict()
    # none (dense), topk, topp, expert_choice, soft, sequence (one decision per antibody)
    moe.router = "none"
    moe.experts = 8
    # experts per token; topp: at most; expert_choice: on average; soft: not used
    moe.k = 2
    moe.threshold = 0.7  # topp: sum of probabilities at which a token takes no further expert
    # topp: take the expert with which the threshold is crossed; False: only if it is the first
    moe.exceed = True
    # softmax, sigmoid (DeepSeek-V3); expert_choice also tokens (softmax over tokens, as in BALM)
    moe.gate = "softmax"
    # gates of a token sum to 1; None: in topk and sequence with k > 1
    moe.renormalise = placeholder(bool)
    # places of an expert, as a multiple of its fair share k * tokens / experts; None: dropless
    # (expert_choice: 1). In inference token choice is always dropless.
    moe.capacity = placeholder(float)
    moe.group = "sequence"  # tokens that compete: sequence (of an antibody), batch (all of them)
    moe.slots = 64  # soft: slots of each expert for an antibody
    moe.l2 = False  # soft: router inputs and weights of unit length, with a learned scale
    moe.l2_scale = placeholder(float)  # initial scale; None: sqrt(d_model), so logits have sd 1
    moe.ffn = placeholder(int)  # width of an expert; None: model.ffn
    moe.widths = placeholder(tuple)  # topk, topp, sequence: a width for each expert
    moe.shared = 0  # additional experts that compute for every token
    moe.placement = "alternate"  # every, alternate, last_N, or layer numbers such as "1,3,5"
    moe.first_dense = 1  # the first n layers stay dense
    # padding is excluded from routing; BALM-MoE's partial policies: none, or some of
    # "logits,probabilities,aux" (equal logits; last in the queues; left out of router losses)
    moe.pads = "excluded"
    moe.jitter = 0.0  # in training the router's input times a factor from 1 - jitter to 1 + jitter
    moe.balance_rate = 0.0  # auxiliary-loss-free balancing: step of the bias (DeepSeek-V3: 0.001)
    # weights of the router losses
    moe.load_balance = 0.01  # token choice only (Switch)
    moe.z_loss = 0.001  # ST-MoE
    moe.entropy_loss = 0.0  # top-p routing (BALM-MoE: 1e-4)

    c.train = train = ConfigDict()
    train.init = placeholder(str)  # run, import or hf:ORG/NAME to start from; None: random weights
    train.freeze = 0  # the embedding and the first n layers are not trained; 0: off
    train.steps = 10_000
    train.batch = 32  # rows per update, over all devices; packed rows have several antibodies
    train.accumulate = 1  # micro-batches per update
    train.optimizer = "adamw"  # or muon: matrices of layers by Muon, all else by AdamW
    train.lr = 4e-4  # peak, of AdamW
    train.muon_lr = 0.02  # muon: peak of the matrices
    train.router_lr = 1.0  # times the rate of routers; 0: they stay as they are
    train.warmup = 500  # steps
    train.schedule = "linear"  # linear, cosine, wsd (warm-up, stable, decay), constant
    train.decay_share = 0.2  # wsd: share of the steps that is decay
    train.restarts = ()  # updates after which the schedule begins anew, warm-up included
    train.beta1 = 0.9
    train.beta2 = 0.98
    train.eps = 1e-6
    train.weight_decay = 0.01
    train.clip = 1.0  # of the gradient's global norm; 0: off
    # updates whose gradient's norm is n sd above the mean of the last 100 are skipped; 0: off
    train.skip_spikes = 0.0
    train.z_loss = 0.0  # weight of log^2 of the output's partition function; 0: off
    train.ema = 0.0  # decay of an average of the weights, which is evaluated instead; 0: off
    train.patience = 0  # stop after n evaluations without improvement; 0: off
    # stop a run whose routing or loss stays collapsed (docs/training.md), with exit code 1
    train.stop_on_collapse = False

    c.eval = evaluation = ConfigDict()
    evaluation.every = 500  # steps
    evaluation.pairs = 1024  # antibodies of the validation split; they and their masks never change

    c.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 500  # steps
    checkpoint.keep = 2  # newest ones, in addition to the best one

    c.log = log = ConfigDict()
    log.every = 10  # steps
    log.tracker = placeholder(str)  # wandb, trackio or mlflow (docs/training.md); None: none
    log.profile = placeholder(str)  # updates to trace, "20:24"; None: none (docs/training.md)

    # below: how a run is computed, outside its identity
    c.mesh = mesh = ConfigDict()
    mesh.data = -1  # -1: all devices that the other axes leave
    mesh.expert = 1
    mesh.fsdp = 1

    c.compute = compute = ConfigDict()
    compute.precision = "auto"  # float32, bfloat16, bfloat16_operands (CPUs with AMX), auto
    compute.scan = placeholder(bool)  # equal layers under lax.scan; None: unrolled
    # what the backward pass recomputes: none; matmuls: all but outputs of matmuls and attention;
    # full: whole layers. None: none on CPU, matmuls on accelerators, full where that does not fit
    compute.remat = placeholder(str)
    compute.loader_threads = 2
    return c
