"""Slow oracles, in the plainest code: what every fast path must equal.  Imports nothing of ours.

Axes: B batch, H query head, G key-value head, T time, S codes, K key width, V value width,
M window.  H is a multiple of G; query head h reads key-value head h // (H / G).

The dense definition (Transformer-VQ, section 3): a query at time t attends to every key s <= t
of its own document with score

    (q_t + u) . k_hat_s  +  [t - s <= M] (q_t + w) . r_(t - s)

where k_hat_s is the code nearest to k_s, u and w are learned biases of a head and r_d the row for
distance d.  Without the cache only keys with t - s <= M are attended to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def nearest_code_by_distance(keys: Tensor, codes: Tensor) -> Tensor:
    """Index of the nearest code, [B, G, T], for keys [B, G, T, K] and codes [G, S, K]."""
    difference = keys[:, :, :, None, :] - codes[None, :, None, :, :]
    return difference.square().sum(-1).argmin(-1)


def relative_scores_by_distance(q: Tensor, rows: Tensor) -> Tensor:
    """[B, H, T, T]: q_t . r_(t-s) where 0 <= t - s <= M, else 0; rows [H, M + 1, K]."""
    n_token, window = q.shape[2], rows.shape[1] - 1
    time = torch.arange(n_token)
    distance = time[:, None] - time[None, :]
    inside = (distance >= 0) & (distance <= window)
    row_of_pair = rows[:, distance.clamp(0, window)]  # [H, T, T, K]
    return torch.einsum("bhtk,htsk->bhts", q, row_of_pair) * inside


def softmax_attention_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: tuple[Tensor, Tensor, Tensor],
    documents: Tensor,
    window_only: bool = False,
) -> Tensor:
    """Dense causal softmax attention over unquantized keys with the relative position bias.

    q [B, H, T, K], k [B, G, T, K], v [B, G, T, V]; bias = (u [H, K], w [H, K], r [H, M+1, K]);
    documents [B, T], equal for tokens of one document.  Returns [B, H, T, V].
    """
    u, w, rows = bias
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = (q + u[:, None]) @ k.mT + relative_scores_by_distance(q + w[:, None], rows)
    visible = visible_pairs(documents, rows.shape[1] - 1, window_only)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v


def vq_attention_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codes: Tensor,
    bias: tuple[Tensor, Tensor, Tensor],
    documents: Tensor,
    block_starts: list[int],
    cache: bool = True,
    cache_grad: bool = True,
) -> Tensor:
    """Dense attention over quantized keys; arguments as above, codes [G, S, K].

    ``block_starts`` are the times at which blocks begin, 0 first.  They decide gradients alone.
    With t0 the start of the query's block, a key receives its straight-through gradient only
    from queries for which it is recent, s >= t0 - M; older keys are read as constants of the
    codebook.  Without ``cache_grad`` keys and values before t0 receive nothing at all.
    """
    u, w, rows = bias
    window = rows.shape[1] - 1
    share = q.shape[1] // k.shape[1]
    z = nearest_code_by_distance(k, codes)
    constant = torch.stack([codes[g, z[:, g]] for g in range(codes.shape[0])], 1)
    straight_through = k + (constant - k).detach()
    constant, straight_through, v = (
        x.repeat_interleave(share, 1) for x in (constant.detach(), straight_through, v)
    )
    time = torch.arange(q.shape[2])
    block_start = torch.tensor([max(b for b in block_starts if b <= t) for t in time.tolist()])
    in_block = time[None, :] >= block_start[:, None]
    recent = time[None, :] >= block_start[:, None] - window
    with_gradient = recent if cache_grad else in_block

    query = q + u[:, None]
    content = torch.where(with_gradient, query @ straight_through.mT, query @ constant.mT)
    scores = content + relative_scores_by_distance(q + w[:, None], rows)
    visible = visible_pairs(documents, window, window_only=not cache)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    if cache_grad:
        return weights @ v
    return (weights * in_block) @ v + (weights * ~in_block) @ v.detach()


def visible_pairs(documents: Tensor, window: int, window_only: bool) -> Tensor:
    """Bool [B, 1, T, T]: whether the query (row) may attend to the key (column)."""
    time = torch.arange(documents.shape[1])
    distance = time[:, None] - time[None, :]
    allowed = (distance >= 0) & ((distance <= window) | (not window_only))
    return (allowed & (documents[:, :, None] == documents[:, None, :]))[:, None]


class OVQChoices(NamedTuple):
    """What ``ovq_attention_token_by_token`` is to compute."""

    n_entry: int
    chunk: int
    dictionary_size: Callable[[int, int], int]
    """How many entries there should be after t tokens, given N."""
    read: str = "renormalised"
    """Or "mean", "gmr"."""
    rate: float | None = None
    """None: 1 / count."""
    founders: str = "spread"
    """Or "first", "random", "kmeans++"."""
    filing: str = "join"
    """Or "merge"."""
    draws: Tensor | None = None
    """[G, T] numbers in [0, 1), of which "random" and "kmeans++" take theirs."""


def ovq_attention_token_by_token(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, choices: OVQChoices
) -> Tensor:
    """OVQ-attention of one document from an empty dictionary, one head and token at a time.

    q [B, H, T, K], k [B, G, T, K] of length 1, v [B, G, T, V], beta [H].  Returns [B, H, T, V].
    """
    share = q.shape[1] // k.shape[1]
    rows = []
    for b in range(q.shape[0]):
        heads = []
        for h in range(q.shape[1]):
            g = h // share
            heads.append(_ovq_one_head(q[b, h], k[b, g], v[b, g], beta[h], g, choices))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


_Entry = tuple[Tensor, Tensor, int]
"""Mean key, mean value, count."""


def _ovq_one_head(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: int, choices: OVQChoices
) -> Tensor:
    entries: list[_Entry] = []
    open_chunk: list[int] = []
    outputs = []
    for t in range(len(q)):
        open_chunk.append(t)
        total, norm = torch.zeros_like(v[0]), torch.zeros_like(beta)
        for mean_key, mean_value, count in entries:
            score = _ovq_score(q[t], mean_key, choices.read)
            weight = count * torch.exp(beta * score)
            total, norm = total + weight * mean_value, norm + weight
        for j in open_chunk:
            weight = torch.exp(beta * (q[t] @ k[j]))
            total, norm = total + weight * v[j], norm + weight
        outputs.append(total / norm)
        if len(open_chunk) == choices.chunk:
            wanted = max(len(entries), choices.dictionary_size(t + 1, choices.n_entry))
            if choices.filing == "merge":
                wanted = min(wanted, len(entries) + len(open_chunk))
                entries += [(k[j], v[j], 1) for j in open_chunk]
                entries = _ovq_merge(entries, wanted)
            else:
                entries = _ovq_file(entries, open_chunk, k, v, wanted - len(entries), g, choices)
            open_chunk = []
    return torch.stack(outputs)


def _ovq_score(q: Tensor, mean_key: Tensor, read: str) -> Tensor:
    if read == "renormalised":
        return q @ mean_key / mean_key.norm().clamp(min=1e-9)
    if read == "mean":
        return q @ mean_key
    # 1 - |q - m|^2 / 2 for q of length 1: a Gaussian around m, relative to one around q itself.
    return q @ mean_key + (1 - mean_key @ mean_key) / 2


def _ovq_step(x: Tensor) -> int:
    """``x`` in whole steps of 2^-14, in which OVQ compares."""
    return round(x.item() * 2**14)


def _ovq_file(
    entries: list[_Entry], members: list[int], k: Tensor, v: Tensor, n_new: int, g: int,
    choices: OVQChoices,
) -> list[_Entry]:  # fmt: skip
    """Files a full chunk: some of its keys become entries, the others join the most similar."""
    means = [mean_key.detach() for mean_key, _, _ in entries]
    founders = _ovq_founders(means, members, k.detach(), min(n_new, len(members)), g, choices)
    candidates = means + [k[i].detach() for i in founders]
    joining: list[list[int]] = [[] for _ in entries] + [[i] for i in founders]
    for i in members:
        if i not in founders:
            similar = [_ovq_step(k[i] @ c) for c in candidates]
            joining[similar.index(max(similar))].append(i)
    filed = []
    for s, new in enumerate(joining):
        known = s < len(entries)
        mean_key, mean_value, count = entries[s] if known else (k[new[0]], v[new[0]], 0)
        if new:
            total = count + len(new)
            share = len(new) / total
            if known and choices.rate is not None:
                share = 1 - (1 - choices.rate) ** len(new)
            mean_key = mean_key + share * (sum(k[i] for i in new) / len(new) - mean_key)
            mean_value = mean_value + share * (sum(v[i] for i in new) / len(new) - mean_value)
            count = total
        filed.append((mean_key, mean_value, count))
    return filed


def _ovq_founders(
    means: list[Tensor], members: list[int], k: Tensor, n_new: int, g: int, choices: OVQChoices
) -> list[int]:
    if choices.founders == "first":
        return members[:n_new]
    if choices.founders == "random":
        assert choices.draws is not None
        draws = choices.draws[g]
        return sorted(sorted(members, key=lambda i: draws[i].item())[:n_new])
    if choices.founders == "kmeans++":
        return _ovq_kmeans_plus_plus(means, members, k, n_new, g, choices)
    familiarity: dict[int, float] = {}
    for position, i in enumerate(members):
        others = [k[i] @ m for m in means] + [k[i] @ k[j] for j in members[:position]]
        familiarity[i] = max((_ovq_step(x) for x in others), default=float("-inf"))
    return sorted(sorted(members, key=lambda i: (familiarity[i], i))[:n_new])


def _ovq_kmeans_plus_plus(
    means: list[Tensor], members: list[int], k: Tensor, n_new: int, g: int, choices: OVQChoices
) -> list[int]:
    assert choices.draws is not None
    known, founders = list(means), []
    for step in range(n_new):
        rest = [i for i in members if i not in founders]
        shares = []
        for i in rest:
            nearest = max([_ovq_step(k[i] @ m) * 2.0**-14 for m in known], default=-1.0)
            shares.append(max(2 - 2 * nearest, 1e-9))
        aim = choices.draws[g][members[step]].item() * sum(shares)
        for i, share in zip(rest, shares, strict=True):
            aim -= share
            if aim < 0 or i == rest[-1]:
                founders.append(i)
                known.append(k[i])
                break
    return sorted(founders)


def _ovq_merge(items: list[_Entry], n_left: int) -> list[_Entry]:
    """Merges those whose merger with an earlier item makes squared distances grow least."""
    least = []
    for i, (key, _, count) in enumerate(items):
        costs = [
            _ovq_step((key - other).square().sum() * count * n / (count + n))
            for other, _, n in items[:i]
        ]
        best = min(range(i), key=lambda j: costs[j], default=i)
        least.append((costs[best] if costs else float("inf"), i, best))
    partner = {i: j for _, i, j in sorted(least)[: len(items) - n_left]}
    roots: dict[int, list[_Entry]] = {}
    for i, item in enumerate(items):
        root = i
        while root in partner:
            root = partner[root]
        roots.setdefault(root, []).append(item)
    merged = []
    for members in roots.values():
        count = sum(n for _, _, n in members)
        key = torch.stack([n * key for key, _, n in members]).sum(0) / count
        value = torch.stack([n * value for _, value, n in members]).sum(0) / count
        merged.append((key, value, count))
    return merged


def dictionary_attention_token_by_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    n_entry: int,
    chunk: int,
    window: int,
    dictionary_size: Callable[[int, int], int],
) -> Tensor:
    """Attention over a dictionary for keys of any size, of one sequence from its start.

    q [H, T, K], k [G, T, K], v [G, T, V]; ``window`` is a multiple of ``chunk``.  A chunk is filed
    when a token comes in that is ``window`` + 1 or more tokens after its end.  Returns [H, T, V].
    """
    share = q.shape[0] // k.shape[0]
    heads = []
    for h in range(q.shape[0]):
        keys, values = k[h // share], v[h // share]
        entries: list[list[int]] = []  # the tokens of each
        rows, n_filed = [], 0
        for t in range(q.shape[1]):
            if t % chunk == 0 and t - n_filed >= window + chunk:
                members = list(range(n_filed, n_filed + chunk))
                n_filed += chunk
                wanted = max(len(entries), dictionary_size(n_filed, n_entry))
                entries = _file_by_distance(entries, members, keys.detach(), wanted)
            scores = [scale * q[h, t] @ keys[m].mean(0) + math.log(len(m)) for m in entries]
            scores += [scale * q[h, t] @ keys[j] for j in range(n_filed, t + 1)]
            found = [values[m].mean(0) for m in entries]
            found += [values[j] for j in range(n_filed, t + 1)]
            rows.append(torch.stack(scores).softmax(0) @ torch.stack(found))
        heads.append(torch.stack(rows))
    return torch.stack(heads)


def _file_by_distance(
    entries: list[list[int]], members: list[int], keys: Tensor, wanted: int
) -> list[list[int]]:
    """The chunk's farthest keys become entries, the others join the nearest mean."""
    means = [keys[m].mean(0) for m in entries]
    novelty = []
    for position, i in enumerate(members):
        others = means + [keys[j] for j in members[:position]]
        distances = [(keys[i] - other).square().sum().item() for other in others]
        novelty.append(min(distances, default=float("inf")))
    order = sorted(range(len(members)), key=lambda position: (-novelty[position], position))
    founders = sorted(members[p] for p in order[: wanted - len(entries)])
    merged = [list(m) for m in entries] + [[i] for i in founders]
    candidates = means + [keys[i] for i in founders]
    for i in members:
        if i not in founders:
            distances = [(keys[i] - c).square().sum().item() for c in candidates]
            merged[distances.index(min(distances))].append(i)
    return merged
