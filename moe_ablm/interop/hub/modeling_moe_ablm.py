"""Encoders of moe_ablm for transformers, in one file that needs nothing of moe_ablm.

    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model = AutoModelForMaskedLM.from_pretrained(DIRECTORY, trust_remote_code=True).eval()

An ESM-2 encoder (pre-LN, rotary positions; or as ESM-1b or RoBERTa, with learned positions and
other norms) in which some FFNs are mixtures of experts. Routing is
that of inference: an antibody is a row, its result depends on no other row, and token choice drops
nothing. Training here has neither a capacity nor router losses.

Axis letters: B batch, L length, D width, F FFN width, H heads, E experts, K experts a token,
S slots of an expert.
"""

import math

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

TRAINED_MASK_RATIO = 0.15 * 0.8  # share of <mask> that token_dropout assumes


class MoeAblmConfig(PretrainedConfig):
    """What an encoder is; `moe` is None for a dense one (its keys: `MixtureOfExperts`)."""

    model_type = "moe_ablm"

    def __init__(
        self,
        vocab_size=33,
        hidden_size=320,
        num_hidden_layers=6,
        num_attention_heads=20,
        intermediate_size=1280,
        activation="gelu",
        token_dropout=True,
        tied=True,
        layer_norm_eps=1e-5,
        learned_positions=0,
        embedding_norm=False,
        post_norm=False,
        moe=None,
        mask_token_id=32,
        pad_token_id=1,
        initializer_range=0.02,
        **others,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.activation = activation
        self.token_dropout = token_dropout
        self.tied = tied  # the decoder is the embedding
        self.layer_norm_eps = layer_norm_eps
        self.learned_positions = learned_positions  # 0: rotary
        self.embedding_norm = embedding_norm
        self.post_norm = post_norm  # layers normalise after the additions
        self.moe = moe
        self.mask_token_id = mask_token_id
        self.initializer_range = initializer_range
        others["tie_word_embeddings"] = False  # `tied` has no second parameter to tie
        super().__init__(pad_token_id=pad_token_id, **others)


def activate(hidden, activation):
    """GELU, or SwiGLU of the two halves of the last axis."""
    if activation == "gelu":
        return functional.gelu(hidden)
    gate, value = hidden.chunk(2, dim=-1)
    return functional.silu(gate) * value


def unit_length(x, axis):
    """x divided by its norm along an axis."""
    return x * (x.square().sum(axis, keepdim=True) + 1e-12).rsqrt()


def rotary(x):
    """Rotary positions 0 to L - 1 of queries or keys [B, H, L, D/H]; halves are rotated."""
    length, width = x.shape[-2:]
    frequency = 10_000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency.repeat(2))
    cos, sin = (f(angle).to(x) for f in (torch.cos, torch.sin))
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class SelfAttention(nn.Module):
    """Multi-head attention to the valid tokens of the row."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.turn = torch.nn.Identity() if config.learned_positions else rotary
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, valid):
        """x [B, L, D], valid [B, L] -> [B, L, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = valid[:, None, None, :]
        out = functional.scaled_dot_product_attention(self.turn(q), self.turn(k), v, mask)
        return self.out(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config, width):
        super().__init__()
        self.activation = config.activation
        inputs = width * (2 if config.activation == "swiglu" else 1)
        self.up = nn.Linear(config.hidden_size, inputs)
        self.down = nn.Linear(width, config.hidden_size)

    def forward(self, x):
        """[..., D] -> [..., D]."""
        return self.down(activate(self.up(x), self.activation))


class MixtureOfExperts(nn.Module):
    """Experts in the place of an FFN.

    `config.moe` has: `router` (topk, topp, sequence, expert_choice or soft), `layers` (which have
    experts), `experts` E, `k` K, `widths` (F of every expert) and `chunk` (their greatest common
    divisor: a wide expert is stored as several of this width), `gate` (softmax, sigmoid, or
    tokens), `renormalise`, `threshold` and `exceed` (top-p), `capacity` (expert choice), `slots` S
    and `normalised` (soft), `balanced` (a bias decides with the gates), `shared_ffn` (0: none).
    """

    def __init__(self, config):
        super().__init__()
        self.moe, self.activation = config.moe, config.activation
        experts, d, f = self.moe["experts"], config.hidden_size, self.moe["chunk"]
        self.parts = [width // f for width in self.moe["widths"]]
        stored, inputs = sum(self.parts), f * (2 if config.activation == "swiglu" else 1)
        slots = (self.moe["slots"],) if self.moe["router"] == "soft" else ()
        self.router = nn.Parameter(torch.empty(d, experts, *slots))
        self.scale = nn.Parameter(torch.empty(())) if self.moe["normalised"] else None
        self.balance = nn.Parameter(torch.empty(experts)) if self.moe["balanced"] else None
        self.up = nn.Parameter(torch.empty(stored, d, inputs))
        self.up_bias = nn.Parameter(torch.empty(stored, inputs))
        self.down = nn.Parameter(torch.empty(stored, f, d))
        self.down_bias = nn.Parameter(torch.empty(experts, d))
        shared = self.moe["shared_ffn"]
        self.shared = FeedForward(config, shared) if shared else None

    def forward(self, x, valid):
        """x [B, L, D], valid [B, L] -> [B, L, D]."""
        if self.moe["router"] == "soft":
            out = self.softly(x, valid)
        else:
            out = self.dispatch(x, *self.route(x, valid))
        return out if self.shared is None else out + self.shared(x)

    def logits(self, x):
        """Router logits [B, L, E], of soft-MoE [B, L, E, S], in float32."""
        x, kernel = x.float(), self.router.float()
        if self.scale is not None:
            x, kernel = unit_length(x, -1), self.scale.float() * unit_length(kernel, 0)
        return torch.tensordot(x, kernel, 1)

    def expert(self, e, rows):
        """FFN of expert e: [..., D] -> [..., D]."""
        first = sum(self.parts[:e])
        out = self.down_bias[e]
        for i in range(first, first + self.parts[e]):
            hidden = activate(rows @ self.up[i] + self.up_bias[i], self.activation)
            out = out + hidden @ self.down[i]
        return out

    def dispatch(self, x, chosen, gates):
        """Sum of the experts' outputs, weighted: chosen bool [B, L, E], gates [B, L, E]."""
        out = torch.zeros_like(x)
        for e in range(self.moe["experts"]):
            rows = chosen[..., e].nonzero(as_tuple=True)
            if len(rows[0]):
                weighted = gates[..., e][rows][:, None].to(x) * self.expert(e, x[rows])
                out = out.index_put(rows, weighted, accumulate=True)
        return out

    def route(self, x, valid):
        """Which experts compute for a token, bool [B, L, E], and their weights [B, L, E]."""
        per_antibody = self.moe["router"] == "sequence"
        if per_antibody:
            mean = (x.float() * valid[..., None]).sum(1, keepdim=True)
            x = mean / valid.sum(1).clamp(min=1)[:, None, None]
        logits = self.logits(x)
        if self.moe["router"] == "expert_choice":
            return self.choose_tokens(logits, valid)
        chosen, gates = self.choose_experts(logits)
        chosen = chosen & valid[..., None]
        return chosen, gates.expand(chosen.shape)

    def choose_experts(self, logits):
        """Token choice: the K best experts, or in top-p as many as reach the threshold."""
        gates = logits.softmax(-1) if self.moe["gate"] == "softmax" else logits.sigmoid()
        preference = gates if self.balance is None else gates + self.balance.float()
        order = preference.sort(dim=-1, descending=True, stable=True).indices[..., : self.moe["k"]]
        kept = torch.ones_like(order, dtype=torch.bool)
        if self.moe["router"] == "topp":
            share = (gates / gates.sum(-1, keepdim=True)).gather(-1, order)
            before = share.cumsum(-1) - share
            kept = before < self.moe["threshold"]
            if not self.moe["exceed"]:  # the expert that crosses the threshold stays out
                kept = before + share <= self.moe["threshold"]
                kept[..., 0] = True
        chosen = torch.zeros_like(gates, dtype=torch.bool).scatter(-1, order, kept)
        gates = gates * chosen
        if self.moe["renormalise"]:
            total = gates.sum(-1, keepdim=True)
            gates = gates / torch.where(total > 0, total, 1.0)
        return chosen, gates

    def choose_tokens(self, logits, valid):
        """Expert choice: every expert takes its best tokens of the antibody."""
        masked = logits.masked_fill(~valid[..., None], -1e30)
        gates = {
            "softmax": lambda: logits.softmax(-1),
            "sigmoid": lambda: logits.sigmoid(),
            "tokens": lambda: masked.softmax(1),
        }[self.moe["gate"]]()
        gates = gates * valid[..., None]
        # tokens by falling gate, of equal ones the first; padding last
        score = gates.masked_fill(~valid[..., None], -1.0)
        place = score.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
        limit = torch.tensor([self.places(int(n)) for n in valid.sum(1)], device=logits.device)
        return (place < limit[:, None, None]) & valid[..., None], gates

    def places(self, tokens):
        """Tokens that an expert takes of an antibody with so many."""
        share = self.moe["capacity"] * self.moe["k"] * tokens / self.moe["experts"]
        return max(math.ceil(share - 1e-9), min(tokens, 1))

    def softly(self, x, valid):
        """Slots are means of tokens; a token is a mean of the slots' outputs."""
        logits, mask = self.logits(x), valid[:, :, None, None]
        dispatch = logits.masked_fill(~mask, -1e30).softmax(1) * mask
        combine = logits.flatten(2).softmax(-1).unflatten(-1, logits.shape[2:]) * mask
        slots = torch.einsum("bles,bld->ebsd", dispatch.to(x), x)
        out = torch.stack([self.expert(e, rows) for e, rows in enumerate(slots)])
        return torch.einsum("bles,ebsd->bld", combine.to(x), out)


class Layer(nn.Module):
    """A transformer layer, dense or with experts."""

    def __init__(self, config, sparse):
        super().__init__()
        self.post_norm = config.post_norm
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = SelfAttention(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        dense = None if sparse else FeedForward(config, config.intermediate_size)
        self.ffn = dense or MixtureOfExperts(config)

    def forward(self, x, valid):
        """x [B, L, D], valid [B, L] -> [B, L, D]."""
        if self.post_norm:
            x = self.attention_norm(x + self.attention(x, valid))
            return self.ffn_norm(x + self.feed(x, valid))
        x = x + self.attention(self.attention_norm(x), valid)
        return x + self.feed(self.ffn_norm(x), valid)

    def feed(self, x, valid):
        """The FFN, or its experts."""
        return self.ffn(x, valid) if isinstance(self.ffn, MixtureOfExperts) else self.ffn(x)


class MoeAblmPreTrainedModel(PreTrainedModel):
    """What the models share: the config, and initial weights from N(0, 0.02^2)."""

    config_class = MoeAblmConfig
    base_model_prefix = "encoder"
    _no_split_modules = ["Layer"]

    def _init_weights(self, module):
        deviation = self.config.initializer_range
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            return
        for name, parameter in module.named_parameters(recurse=False):
            if name == "scale":
                nn.init.constant_(parameter, math.sqrt(self.config.hidden_size))
            elif "bias" in name or name == "balance":
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, 0.0, deviation)


class MoeAblmModel(MoeAblmPreTrainedModel):
    """The encoder without the language-model head."""

    def __init__(self, config):
        super().__init__(config)
        sparse = config.moe["layers"] if config.moe else ()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.embedding = nn.Embedding(config.vocab_size, width)
        table = torch.empty(config.learned_positions, width)
        self.positions = nn.Parameter(table) if config.learned_positions else None
        self.embedding_norm = nn.LayerNorm(width, eps) if config.embedding_norm else None
        self.layers = nn.ModuleList(
            Layer(config, i in sparse) for i in range(config.num_hidden_layers)
        )
        self.final_norm = None if config.post_norm else nn.LayerNorm(width, eps)
        self.post_init()

    def get_input_embeddings(self):
        """The token embedding."""
        return self.embedding

    def embed(self, tokens, valid):
        """Embeddings [B, L, D]; with token_dropout that of <mask> is 0 and the rest rescaled."""
        x = self.embedding(tokens)
        if self.config.token_dropout:
            masked = (tokens == self.config.mask_token_id) & valid
            ratio = masked.sum(1) / valid.sum(1).clamp(min=1)
            scale = (1 - TRAINED_MASK_RATIO) / (1 - ratio).clamp(min=1e-6)
            x = x.masked_fill(masked[..., None], 0.0) * scale[:, None, None].to(x)
        if self.positions is not None:
            if valid[:, len(self.positions) :].any():
                raise ValueError(f"a row is longer than {len(self.positions)} learned positions")
            x = x + functional.pad(self.positions, (0, 0, 0, x.shape[1]))[: x.shape[1]]
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        return x * valid[..., None]

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False, **_):
        """Tokens [B, L], padding at the end of rows -> hidden states [B, L, D] of every token."""
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        valid = attention_mask.bool()
        states = [x := self.embed(input_ids, valid)]
        for layer in self.layers:
            states.append(x := layer(x, valid))
        x = states[-1] = x if self.final_norm is None else self.final_norm(x)
        return BaseModelOutput(x, tuple(states) if output_hidden_states else None)


class LMHead(nn.Module):
    """Dense, GELU, layer norm and a decoder, whose weights may be the embedding's."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        shape = config.vocab_size, config.hidden_size
        self.decoder = None if config.tied else nn.Parameter(torch.empty(shape))

    def forward(self, x, embedding):
        """x [B, L, D], embedding [V, D] -> logits [B, L, V]."""
        x = self.norm(functional.gelu(self.dense(x)))
        return functional.linear(x, embedding if self.decoder is None else self.decoder, self.bias)


class MoeAblmForMaskedLM(MoeAblmPreTrainedModel):
    """The encoder with its language-model head."""

    def __init__(self, config):
        super().__init__(config)
        self.encoder = MoeAblmModel(config)
        self.head = LMHead(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, output_hidden_states=False, **_):
        """Logits [B, L, V]; with labels (-100: not counted) also the mean cross-entropy."""
        out = self.encoder(input_ids, attention_mask, output_hidden_states)
        logits = self.head(out.last_hidden_state, self.encoder.embedding.weight)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss, logits, out.hidden_states)
