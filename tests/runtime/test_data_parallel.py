"""Replicas together must give the rows of the whole batch."""

from __future__ import annotations

from typing import Any, Union

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ranks import run_ranks
from xfuser_runtime.config import ParallelConfig
from xfuser_runtime.distributed import initialize_model_parallel
from xfuser_runtime.errors import InputError
from xfuser_runtime.pipelines import data_parallel
from xfuser_runtime.pipelines.data_parallel import Share, count_prompts

Prompts = Union[str, list[str], None]  # noqa: UP007  (as upstream writes it)


class Pipeline:
    """Draws latents and step noise as diffusers does, and mixes in all that belongs to a prompt."""

    def __init__(self) -> None:
        self.freed = False

    def maybe_free_model_hooks(self) -> None:
        self.freed = True

    @data_parallel.enable_data_parallel
    def __call__(
        self,
        prompt: Prompts = None,
        negative_prompt: str = "",
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        sigmas: list[float] | None = None,
    ) -> torch.Tensor:
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            assert prompts is not None
            prompt_embeds = torch.tensor([[float(len(p))] for p in prompts])
        batch = len(prompt_embeds)
        negatives = [negative_prompt] * batch
        if isinstance(negative_prompt, list):
            negatives = negative_prompt
        lengths = torch.tensor([[float(len(n))] for n in negatives])
        rows = batch * (num_images_per_prompt or 1)
        if latents is None:
            latents = _draw(rows, generator)
        embeds = (prompt_embeds + 10 * lengths).repeat_interleave(rows // batch, 0)
        total = sum(sigmas or [0.0])
        return latents + _draw(rows, generator) * 0.5 + embeds + total


def _draw(rows: int, generator: Any) -> torch.Tensor:
    if isinstance(generator, list):
        return torch.cat([torch.randn(1, 4, generator=own) for own in generator])
    return torch.randn(rows, 4, generator=generator)


def _arguments(case: dict[str, Any]) -> dict[str, Any]:
    """Generators cannot cross a fork with their identity, so a case names their seeds."""
    arguments = dict(case)
    seeds = arguments.pop("seeds", None)
    if isinstance(seeds, list):
        arguments["generator"] = [torch.Generator().manual_seed(s) for s in seeds]
    elif seeds is not None:
        arguments["generator"] = torch.Generator().manual_seed(seeds)
    return arguments


def _replica(rank: int, replicas: int, case: dict[str, Any]) -> tuple[Any, bool]:
    initialize_model_parallel(ParallelConfig(data_parallel_degree=replicas))
    pipeline = Pipeline()
    torch.manual_seed(5)
    return pipeline(**_arguments(case)), pipeline.freed


def _stock(case: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(5)
    return Pipeline()(**_arguments(case))


THREE = ["a", "bb", "ccc"]
CASES: dict[str, dict[str, Any]] = {
    "uneven": {"prompt": THREE, "seeds": 1},
    "no generator": {"prompt": THREE},
    "two images": {"prompt": THREE, "num_images_per_prompt": 2, "seeds": 1},
    "generators": {"prompt": THREE, "seeds": [3, 4, 5]},
    "generators, two images": {
        "prompt": THREE,
        "num_images_per_prompt": 2,
        "seeds": [3, 4, 5, 6, 7, 8],
    },
    "negatives": {"prompt": THREE, "negative_prompt": ["x", "", "yy"], "seeds": 1},
    "embeddings": {"prompt_embeds": torch.arange(4.0)[:, None], "seeds": 1},
    "latents": {"prompt": THREE, "latents": torch.arange(12.0).view(3, 4), "seeds": 1},
    "latents, two images": {
        "prompt": THREE,
        "num_images_per_prompt": 2,
        "latents": torch.arange(24.0).view(6, 4),
        "seeds": 1,
    },
    "as many sigmas as prompts": {"prompt": THREE, "sigmas": [1.0, 2.0, 4.0]},
    "as many sigmas as rows": {"prompt": ["a", "b"], "sigmas": [1.0, 2.0]},
}


@pytest.mark.parametrize("name", CASES)
def test_replicas_give_the_rows_of_the_whole_batch(name: str) -> None:
    outputs = [output for output, _ in run_ranks(_replica, 2, 2, CASES[name])]
    assert torch.equal(torch.cat(outputs), _stock(CASES[name]))


def test_draws_of_its_own_rows_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: each replica draws for its own prompts only."""
    from contextlib import nullcontext

    monkeypatch.setattr(
        data_parallel, "rows_of_whole_batch", lambda *a, **k: nullcontext()
    )
    outputs = [output for output, _ in run_ranks(_replica, 2, 2, CASES["uneven"])]
    assert not torch.allclose(torch.cat(outputs), _stock(CASES["uneven"]), atol=1e-2)


def test_more_replicas_than_prompts() -> None:
    case = {"prompt": ["a", "bb"], "seeds": 1}
    results = run_ranks(_replica, 3, 3, case)
    assert torch.equal(torch.cat([results[0][0], results[1][0]]), _stock(case))
    assert results[2] == (None, True)


def test_one_prompt_runs_on_every_replica() -> None:
    case = {"prompt": "a", "num_images_per_prompt": 2, "seeds": 1}
    for output, _ in run_ranks(_replica, 2, 2, case):
        assert torch.equal(output, _stock(case))


def test_one_process_is_left_alone() -> None:
    assert _stock({"prompt": THREE}).shape == (3, 4)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"prompt": "a"}, 1),
        ({"prompt": ["a"]}, 1),
        ({"prompt": ["a", "b"], "prompt_embeds": None}, 2),
        ({"prompt": None, "prompt_embeds": torch.zeros(3, 2, 1)}, 3),
        ({"prompt_embeds": [torch.zeros(2, 1)] * 4}, 4),
        ({"negative_prompt": ["a", "b"], "system_prompt": "you are"}, None),
        ({"class_labels": [1, 2]}, 2),
        ({"task_prompt": ["a", "b", "c"]}, 3),
        ({}, None),
    ],
)
def test_count_prompts(arguments: dict[str, Any], count: int | None) -> None:
    assert count_prompts(arguments) == count


def test_embeddings_that_disagree_are_refused() -> None:
    with pytest.raises(InputError, match="different numbers of rows.*expected one row"):
        count_prompts(
            {
                "prompt_embeds_a": torch.zeros(2, 1),
                "prompt_embeds_b": torch.zeros(32, 2, 1),
            }
        )


SECOND = Share(start=2, stop=3, batch=3, images=2)
P, Q, R = (Image.new("L", (1, 1), grey) for grey in (0, 1, 2))
PICTURES = "PIL.Image.Image | numpy.ndarray | torch.Tensor | list[PIL.Image.Image]"


@pytest.mark.parametrize(
    ("name", "type_text", "value", "taken"),
    [
        ("prompt", "", ["a", "b", "c"], ["c"]),
        ("prompt_2", "str | list[str] | None", ("a", "b", "c"), ("c",)),
        ("negative_prompt", "Optional[str]", ["a", "b", "c"], ["c"]),
        ("negative_prompt", "str", ["n"], ["n"]),
        ("prompt", "str", "abc", "abc"),
        # one text in parts
        ("chi_prompt", "list[str] | None", ["a", "b", "c"], ["a", "b", "c"]),
        ("fonts", "list[str] | None", ["a", "b", "c"], ["a", "b", "c"]),
        (
            "callback_on_step_end_tensor_inputs",
            "list[str]",
            ["latents", "a", "b"],
            ["latents", "a", "b"],
        ),
        ("lyrics", "Union[str, List[str]]", ["la", "le", "lo"], ["lo"]),
        ("negative_prompt", "", ["a", "b", "c"], ["c"]),
        ("class_labels", "list[int]", [7, 8, 9], [9]),
        ("crop", "tuple[int, int, int] | None", (0, 1, 2), (0, 1, 2)),
        ("decode_timestep", "float | list[float]", [0.1, 0.2, 0.3], [0.3]),
        ("timesteps", "list[int] | None", [3, 2, 1], [3, 2, 1]),
        ("sigmas", "Optional[List[float]]", [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]),
        (
            "controlnet_conditioning_scale",
            "float | list[float]",
            [0.1, 0.2, 0.3],
            [0.1, 0.2, 0.3],
        ),
        ("strength", "float | list[float]", [0.5, 0.5], [0.5, 0.5]),
        ("image", PICTURES, [P, Q, R], [R]),
        ("image", PICTURES, [P, Q], [P, Q]),
        ("video", "list[PIL.Image.Image]", [P, Q, R], [P, Q, R]),
        ("video", "list[PipelineImageInput]", [[P], [Q], [R]], [[R]]),
        ("ip_adapter_image", PICTURES, [P, Q, R], [P, Q, R]),
        ("conditions", "list[Condition]", [object, 1, 2], [object, 1, 2]),
    ],
)
def test_lists(name: str, type_text: str, value: Any, taken: Any) -> None:
    assert SECOND.take(name, type_text, value) == taken


@pytest.mark.parametrize(
    ("name", "shape", "rows"),
    [
        ("prompt_embeds", (3, 4, 5), slice(2, 3)),
        ("prompt_attention_mask", (3, 4), slice(2, 3)),
        ("latents", (6, 4, 5), slice(4, 6)),
        ("latents", (1, 4, 5), slice(0, 1)),
        ("image", (3, 3, 8, 8), slice(2, 3)),
        ("image", (3, 8, 8), slice(0, 3)),  # one picture of three channels
        ("image", (1, 3, 8, 8), slice(0, 1)),
        ("mask_image", (3, 8, 8), slice(2, 3)),
        ("video", (3, 3, 8, 8), slice(0, 3)),  # one video of three frames
        ("video", (3, 5, 3, 8, 8), slice(2, 3)),
        ("c2w", (7, 4, 4), slice(0, 7)),
    ],
)
@pytest.mark.parametrize("kind", [torch.zeros, np.zeros])
def test_tensors_and_arrays(
    kind: Any, name: str, shape: tuple[int, ...], rows: slice
) -> None:
    value = kind(shape)
    value[:] = kind(shape) + kind((1,)) + 1
    for row in range(shape[0]):
        value[row] = row
    taken = SECOND.take(name, "torch.Tensor", value)
    assert taken.shape == value[rows].shape
    assert (taken == value[rows]).all()


@pytest.mark.parametrize(
    ("name", "type_text", "value", "message"),
    [
        ("negative_prompt", "str | list[str]", ["a", "b"], "2 entries, expected 3"),
        ("generator", "", [torch.Generator()] * 3, "3 entries, expected 6"),
        ("prompt_embeds", "", torch.zeros(4, 2, 1), r"\(4, 2, 1\) with 3 prompts"),
        ("prompt_cu_seqlens", "", torch.zeros(4), r"\(4,\) with 3 prompts"),
        ("latents", "", torch.zeros(4, 2), r"\(4, 2\) with 3 prompts"),
        ("c2w", "", torch.zeros(3, 4, 4), r"\(3, 4, 4\) with 3 prompts"),
        ("strength", "float | list[float]", [0.1] * 3, "list of 3 numbers"),
        ("image", "list[PIL.Image.Image]", [P] * 3, "list of 3 pictures"),
        (
            "ip_adapter_image_embeds",
            "",
            [torch.zeros(3, 1, 4)],
            "rows of several prompts",
        ),
    ],
)
def test_what_is_not_known_is_refused(
    name: str, type_text: str, value: Any, message: str
) -> None:
    with pytest.raises(InputError, match=f"^{name} .*{message}"):
        SECOND.take(name, type_text, value)


def test_shares_partition_the_prompts() -> None:
    for batch in range(1, 9):
        for replicas in range(1, 9):
            shares = [Share.of_replica(batch, 1, r, replicas) for r in range(replicas)]
            rows = [row for s in shares for row in range(s.start, s.stop)]
            assert rows == list(range(batch))
            sizes = [s.stop - s.start for s in shares]
            assert max(sizes) - min(sizes) <= 1
