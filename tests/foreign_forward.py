"""The forward passes of ESM-1b, ESM-1v and RoBERTa from their papers, in float64 with NumPy.

Tensors have the names of transformers, which computes the same (tests marked `hf`).
"""

import math

import numpy as np


def norm(x, tensors, name, eps):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def linear(x, tensors, name):
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attend(x, tensors, layer, heads):
    q, k, v = (
        linear(x, tensors, f"{layer}attention.self.{n}").reshape(len(x), heads, -1)
        for n in ("query", "key", "value")
    )
    scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1)
    return linear(out, tensors, f"{layer}attention.output.dense")


def feed(x, tensors, layer):
    hidden = gelu(linear(x, tensors, f"{layer}intermediate.dense"))
    return linear(hidden, tensors, f"{layer}output.dense")


def head(x, tensors, eps, embedding):
    x = norm(gelu(linear(x, tensors, "lm_head.dense")), tensors, "lm_head.layer_norm", eps)
    return x @ embedding.T + tensors["lm_head.bias"]


def layers_of(tensors, model):
    count = len({n.split(".")[3] for n in tensors if n.startswith(f"{model}.encoder.layer.")})
    return [f"{model}.encoder.layer.{i}." for i in range(count)]


def esm1(tensors, row, heads, eps, token_dropout, mask=32):
    """Logits `[L, V]` of one row of ESM-1b, or of ESM-1v, which has no norm of the embedding."""
    tensors = {name: array.astype("f8") for name, array in tensors.items()}
    embedding = tensors["esm.embeddings.word_embeddings.weight"]
    x = embedding[row]
    if token_dropout:
        x[row == mask] = 0
        x *= (1 - 0.15 * 0.8) / (1 - (row == mask).mean())
    x = x + tensors["esm.embeddings.position_embeddings.weight"][2 : 2 + len(row)]
    if "esm.embeddings.layer_norm.weight" in tensors:
        x = norm(x, tensors, "esm.embeddings.layer_norm", eps)
    for layer in layers_of(tensors, "esm"):
        x = x + attend(norm(x, tensors, f"{layer}attention.LayerNorm", eps), tensors, layer, heads)
        x = x + feed(norm(x, tensors, f"{layer}LayerNorm", eps), tensors, layer)
    x = norm(x, tensors, "esm.encoder.emb_layer_norm_after", eps)
    return head(x, tensors, eps, embedding)


def roberta(tensors, row, heads, eps):
    """Logits `[L, V]` of one row of RoBERTa, all of it segment 0."""
    tensors = {name: array.astype("f8") for name, array in tensors.items()}
    start, embedding = "roberta.embeddings.", tensors["roberta.embeddings.word_embeddings.weight"]
    x = embedding[row] + tensors[f"{start}token_type_embeddings.weight"][0]
    x = x + tensors[f"{start}position_embeddings.weight"][2 : 2 + len(row)]
    x = norm(x, tensors, f"{start}LayerNorm", eps)
    for layer in layers_of(tensors, "roberta"):
        x = x + attend(x, tensors, layer, heads)
        x = norm(x, tensors, f"{layer}attention.output.LayerNorm", eps)
        x = norm(x + feed(x, tensors, layer), tensors, f"{layer}output.LayerNorm", eps)
    return head(x, tensors, eps, tensors.get("lm_head.decoder.weight", embedding))
