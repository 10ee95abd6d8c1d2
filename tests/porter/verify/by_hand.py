"""Displaced patches written out for two models, with streams that are really cut.

The oracle computes all rows in every pass and corrects what attention sees.  Here nothing
is shared with it: blocks are spelt out, tokens, positions and latents are sliced, and each
scheduler copy holds the rows of its patch alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb

Rows = slice | torch.Tensor


class KeyCache:
    """Keys and values of all rows, by layer."""

    def __init__(self) -> None:
        self.held: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def put(
        self, site: Any, key: torch.Tensor, value: torch.Tensor, rows: Rows | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Overwrite rows (None: all), then return all rows: (B, S, H, D)."""
        if rows is None:
            self.held[site] = (key.clone(), value.clone())
        else:
            self.held[site][0][:, rows] = key
            self.held[site][1][:, rows] = value
        return self.held[site]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention in fp64 over (B, S, H, D); mask (B, keys) of bool."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double())
    scores = scores / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value.double())
    return out.flatten(2).to(query.dtype)


def step_patches(
    scheduler: Any,
    latents: torch.Tensor,
    axis: int,
    patches: list[tuple[int, int]],
    warmup: int,
    predict: Callable[[torch.Tensor, Any, tuple[int, int] | None], torch.Tensor],
    finish: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows,
) -> torch.Tensor:
    """The denoising loop: whole steps, then each patch with a scheduler of its own.

    `predict(latents, t, patch)` returns the guided noise of the patch's rows, `finish(rows)`
    is what the loop's body does to the rows that were stepped.
    """
    copies: list[Any] = []
    timesteps = list(scheduler.timesteps)
    for t in timesteps[:warmup]:
        noise = predict(latents, t, None)
        latents = finish(scheduler.step(noise, t, latents, return_dict=False)[0])
    for start, stop in patches:
        own = copy.deepcopy(scheduler)
        for name, value in vars(own).items():
            if isinstance(value, torch.Tensor) and value.shape == latents.shape:
                setattr(own, name, value.narrow(axis, start, stop - start))
            if isinstance(value, list):
                cut = [
                    (
                        v.narrow(axis, start, stop - start)
                        if isinstance(v, torch.Tensor) and v.shape == latents.shape
                        else v
                    )
                    for v in value
                ]
                setattr(own, name, cut)
        copies.append(own)
    for t in timesteps[warmup:]:
        for own, (start, stop) in zip(copies, patches, strict=True):
            noise = predict(latents, t, (start, stop))
            rows = latents.narrow(axis, start, stop - start)
            stepped = own.step(noise, t, rows, return_dict=False)[0]
            latents = latents.clone()
            latents.narrow(axis, start, stop - start).copy_(finish(stepped))
    return latents


@torch.no_grad()
def pixart(
    pipe: Any,
    call: dict[str, Any],
    patches: list[tuple[int, int]],
    warmup: int,
    finish: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows,
) -> torch.Tensor:
    """The final latents of a guided PixArt call; patches in latent rows."""
    seen: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.setdefault("call", (args[0], kwargs))

    handle = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    pipe(**call)
    handle.remove()
    first, kwargs = seen["call"]
    model, size = pipe.transformer, pipe.transformer.config.patch_size
    batch, channels, _, width = first.shape[0] // 2, *first.shape[1:]
    text = model.caption_projection(kwargs["encoder_hidden_states"])
    bias = (1 - kwargs["encoder_attention_mask"].to(text.dtype)) * -10000.0
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(call["num_inference_steps"])
    cache = KeyCache()

    def predict(
        latents: torch.Tensor, t: Any, patch: tuple[int, int] | None
    ) -> torch.Tensor:
        hidden = model.pos_embed(torch.cat([latents, latents]))
        rows = None
        if patch is not None:
            per_row = width // size
            rows = slice(patch[0] // size * per_row, patch[1] // size * per_row)
            hidden = hidden[:, rows]
        modulation, embedded = model.adaln_single(
            t.expand(2 * batch),
            kwargs["added_cond_kwargs"],
            batch_size=2 * batch,
            hidden_dtype=hidden.dtype,
        )
        for layer, block in enumerate(model.transformer_blocks):
            hidden = _pixart_block(
                block, hidden, modulation, text, bias, cache, layer, rows
            )
        shift, scale = (model.scale_shift_table[None] + embedded[:, None]).chunk(2, 1)
        out = model.proj_out(model.norm_out(hidden) * (1 + scale) + shift)
        out = out.reshape(2 * batch, -1, width // size, size, size, model.out_channels)
        out = torch.einsum("nhwpqc->nchpwq", out)
        out = out.reshape(2 * batch, model.out_channels, -1, width)[:, :channels]
        uncond, cond = out.chunk(2)
        return uncond + call["guidance_scale"] * (cond - uncond)

    return step_patches(scheduler, first[:batch], 2, patches, warmup, predict, finish)


def _pixart_block(
    block: Any,
    hidden: torch.Tensor,
    modulation: torch.Tensor,
    text: torch.Tensor,
    bias: torch.Tensor,
    cache: KeyCache,
    layer: int,
    rows: Rows | None,
) -> torch.Tensor:
    parts = block.scale_shift_table[None] + modulation.reshape(len(hidden), 6, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts.chunk(6, dim=1)
    normed = block.norm1(hidden) * (1 + scale) + shift
    attn = block.attn1
    query, key, value = (
        linear(normed).unflatten(-1, (attn.heads, -1))
        for linear in (attn.to_q, attn.to_k, attn.to_v)
    )
    key, value = cache.put(layer, key, value, rows)
    hidden = gate * attn.to_out[0](attend(query, key, value)) + hidden
    hidden = hidden + block.attn2(
        hidden, encoder_hidden_states=text, attention_mask=bias[:, None]
    )
    normed = block.norm2(hidden) * (1 + scale_mlp) + shift_mlp
    return gate_mlp * block.ff(normed) + hidden


@torch.no_grad()
def joint(
    pipe: Any, call: dict[str, Any], patches: list[tuple[int, int]], warmup: int
) -> torch.Tensor:
    """The final latents of a guided call of the toy with joint attention; patches in
    tokens.  Each patch computes its even share of the text rows, too."""
    calls: list[dict[str, Any]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(kwargs)

    handle = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    pipe(**call)
    handle.remove()
    scheduler = copy.deepcopy(pipe.scheduler)
    # As the pipeline left it: set_timesteps was called with the shift of this size.
    scheduler._step_index = None
    scheduler.set_begin_index(0)
    caches = (KeyCache(), KeyCache())

    def predict(
        latents: torch.Tensor, t: Any, patch: tuple[int, int] | None
    ) -> torch.Tensor:
        # A patch is told by its place among all of them.
        place = None if patch is None else (patches.index(patch), len(patches))
        cond, uncond = (
            _joint_call(pipe.transformer, kwargs, latents, t, patch, place, cache)
            for kwargs, cache in zip(calls[:2], caches, strict=True)
        )
        return uncond + call["true_cfg_scale"] * (cond - uncond)

    first = calls[0]["hidden_states"]
    return step_patches(scheduler, first, 1, patches, warmup, predict)


def _joint_call(
    model: Any,
    kwargs: dict[str, Any],
    latents: torch.Tensor,
    t: Any,
    patch: tuple[int, int] | None,
    place: tuple[int, int] | None,
    cache: KeyCache,
) -> torch.Tensor:
    image = model.x_embedder(latents)
    text = model.context_embedder(kwargs["encoder_hidden_states"])
    length, timestep = text.shape[1], t.expand(len(latents)).to(latents.dtype)
    temb = model.time_embed(model.time_proj(timestep).to(latents.dtype))
    cos, sin = model.pos_embed(torch.cat((kwargs["txt_ids"], kwargs["img_ids"])))
    mask = torch.cat(
        [
            kwargs["encoder_attention_mask"].bool(),
            torch.ones(image.shape[:2], dtype=torch.bool),
        ],
        dim=1,
    )
    rows = None
    if patch is not None and place is not None:
        image = image[:, patch[0] : patch[1]]
        own = torch.arange(length).tensor_split(place[1])[place[0]]
        text = text[:, own]
        rows = torch.cat([own, length + torch.arange(*patch)])
    rope = (cos, sin) if rows is None else (cos[rows], sin[rows])
    for layer, block in enumerate(model.transformer_blocks):
        image, text = _joint_block(
            block, image, text, temb, mask, rope, cache, layer, rows
        )
    return model.proj_out(model.norm_out(image, temb))


def _joint_block(
    block: Any,
    image: torch.Tensor,
    text: torch.Tensor,
    temb: torch.Tensor,
    mask: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    cache: KeyCache,
    layer: int,
    rows: Rows | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    condition = torch.nn.functional.silu(temb)[:, None]
    i = block.modulation(condition).chunk(6, dim=-1)
    c = block.modulation_context(condition).chunk(6, dim=-1)
    attn = block.attn
    normed = block.norm1(image) * (1 + i[1]) + i[0]
    normed_text = block.norm1_context(text) * (1 + c[1]) + c[0]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (attn.heads, -1))

    query = torch.cat(
        [heads(attn.add_q_proj(normed_text)), attn.norm_q(heads(attn.to_q(normed)))], 1
    )
    key = torch.cat(
        [heads(attn.add_k_proj(normed_text)), attn.norm_k(heads(attn.to_k(normed)))], 1
    )
    value = torch.cat(
        [heads(attn.add_v_proj(normed_text)), heads(attn.to_v(normed))], 1
    )
    query = apply_rotary_emb(query, rope, sequence_dim=1)
    key = apply_rotary_emb(key, rope, sequence_dim=1)
    key, value = cache.put(layer, key, value, rows)
    out = attend(query, key, value, mask)
    length = text.shape[1]
    image = image + i[2] * attn.to_out(out[:, length:])
    text = text + c[2] * attn.to_add_out(out[:, :length])
    image = image + i[5] * block.ff(block.norm2(image) * (1 + i[4]) + i[3])
    text = text + c[5] * block.ff_context(block.norm2_context(text) * (1 + c[4]) + c[3])
    return image, text
