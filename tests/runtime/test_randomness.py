"""Random numbers of ranks and replicas against those of one process.

The pipeline draws in the three places where diffusers' pipelines do: first latents,
the VAE's posterior, the scheduler's noise.  Its model works element by element, so equal
numbers give equal bits.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.pipelines.flux.pipeline_flux_img2img import retrieve_latents
from diffusers.utils.torch_utils import randn_tensor

from tests.ranks import RankError, run_ranks
from xfuser_runtime import randomness
from xfuser_runtime.config import ParallelConfig
from xfuser_runtime.distributed.parallel_state import (
    Group,
    get_world_group,
    initialize_model_parallel,
)
from xfuser_runtime.randomness import (
    find_generators,
    intercept_draws,
    rows_of_whole_batch,
    same_randomness,
)

CHANNELS, SIZE = 4, 6


class Encoder:
    """Stands for a VAE; its posterior is diffusers' own."""

    def encode(self, image: torch.Tensor) -> AutoencoderKLOutput:
        parameters = torch.cat([image, image * 0.3 - 1], dim=1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(parameters))


class Pipeline(DiffusionPipeline):
    """Image to image in diffusers' manner, without text or weights."""

    def __init__(self, scheduler: DDPMScheduler) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)
        self.vae = Encoder()

    def encode(self, image: torch.Tensor, generator: Any, batch: int) -> torch.Tensor:
        if isinstance(generator, list):
            rows = [
                retrieve_latents(self.vae.encode(image[i : i + 1]), generator[i])
                for i in range(len(image))
            ]
            latents = torch.cat(rows, dim=0)
        else:
            latents = retrieve_latents(self.vae.encode(image), generator)
        return latents.repeat_interleave(batch // len(image), dim=0)

    def __call__(
        self,
        prompt: list[str],
        image: torch.Tensor,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        num_inference_steps: int = 3,
    ) -> torch.Tensor:
        batch = len(prompt) * num_images_per_prompt
        shape = (batch, CHANNELS, SIZE, SIZE)
        latents = randn_tensor(shape, generator=generator)
        latents = latents + 0.5 * self.encode(image, generator, batch)
        text = torch.tensor([float(len(p)) for p in prompt])
        text = text.repeat_interleave(num_images_per_prompt)[:, None, None, None]
        # One for the whole batch, as augmentation levels are.
        latents = latents * (1 + 0.1 * torch.rand(()))
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noise_pred = torch.sin(latents * text) + 0.01 * torch.randn_like(latents)
            latents = self.scheduler.step(
                noise_pred, t, latents, generator=generator
            ).prev_sample
        return latents


@dataclass(frozen=True)
class Case:
    """A call: prompts, pictures each, replicas, kind of generator, one image for all."""

    prompts: int
    images: int
    replicas: int
    generator: str
    shared_image: bool = False


CASES = [
    Case(2, 1, 2, "none"),
    Case(2, 1, 2, "one"),
    Case(2, 1, 2, "list"),
    Case(3, 2, 2, "none"),
    Case(3, 2, 2, "one"),
    Case(5, 1, 3, "none"),
    Case(5, 1, 3, "list"),
    Case(3, 2, 2, "none", shared_image=True),
    Case(3, 2, 2, "one", shared_image=True),
]


def _generator(case: Case, seed: int = 40) -> Any:
    count = case.prompts * case.images
    if case.generator == "none":
        return None
    if case.generator == "one":
        return torch.Generator().manual_seed(seed)
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def _arguments(case: Case) -> dict[str, Any]:
    rows = 1 if case.shared_image else case.prompts
    image = torch.linspace(-1, 1, rows * CHANNELS * SIZE * SIZE)
    return {
        "prompt": ["a" * (index + 1) for index in range(case.prompts)],
        "image": image.reshape(rows, CHANNELS, SIZE, SIZE),
        "num_images_per_prompt": case.images,
    }


def _bounds(case: Case, rank: int) -> tuple[int, int]:
    base, extra = divmod(case.prompts, case.replicas)
    start = rank * base + min(rank, extra)
    return start, start + base + (rank < extra)


def _replica(rank: int, case: Case, sabotage: str = "") -> dict[str, Any]:
    initialize_model_parallel(ParallelConfig(data_parallel_degree=case.replicas))
    torch.manual_seed(7 + 100 * rank)  # what users forget
    start, stop = _bounds(case, rank)
    arguments, generator = _arguments(case), _generator(case, 40 + 100 * rank)
    nothing = nullcontext()
    with (
        same_randomness(get_world_group(), arguments, {"generator": generator})
        if (sabotage != "different states")
        else nothing
    ):
        arguments["prompt"] = arguments["prompt"][start:stop]
        if not case.shared_image:
            arguments["image"] = arguments["image"][start:stop]
        own: list[torch.Generator] = []
        if case.generator == "list":
            own = generator = generator[start * case.images : stop * case.images]
        if sabotage == "others' generators":
            own = []
        shared = case.shared_image and sabotage != "shared image drawn per sample"
        with (
            rows_of_whole_batch(
                start, stop, case.prompts, own_generators=own, shared_posterior=shared
            )
            if sabotage != "own rows only"
            else nullcontext()
        ):
            latents = Pipeline(DDPMScheduler())(**arguments, generator=generator)
    states = [g.get_state() for g in find_generators(generator)]
    return {"latents": latents, "states": states, "global": torch.get_rng_state()}


def _one_process(case: Case) -> dict[str, Any]:
    torch.manual_seed(7)
    generator = _generator(case)
    latents = Pipeline(DDPMScheduler())(**_arguments(case), generator=generator)
    states = [g.get_state() for g in find_generators(generator)]
    return {"latents": latents, "states": states, "global": torch.get_rng_state()}


def _differences(case: Case, sabotage: str = "") -> list[str]:
    expected = _one_process(case)
    found = []
    for rank, result in enumerate(run_ranks(_replica, case.replicas, case, sabotage)):
        start, stop = (bound * case.images for bound in _bounds(case, rank))
        if not torch.equal(result["latents"], expected["latents"][start:stop]):
            found.append(f"latents of rank {rank}")
        states = expected["states"]
        if case.generator == "list":
            states = states[start:stop]
        for mine, theirs in zip(result["states"], states, strict=True):
            if not torch.equal(mine, theirs):
                found.append(f"generator of rank {rank}")
        if not torch.equal(result["global"], expected["global"]):
            found.append(f"global state of rank {rank}")
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replicas_give_the_rows_of_one_process(case: Case) -> None:
    assert not _differences(case)


@pytest.mark.parametrize(
    ("sabotage", "case"),
    [
        ("different states", Case(3, 2, 2, "none")),
        ("different states", Case(3, 2, 2, "one")),
        ("different states", Case(5, 1, 3, "list")),
        ("own rows only", Case(3, 2, 2, "none")),
        ("own rows only", Case(3, 2, 2, "one")),
        ("others' generators", Case(2, 1, 2, "list")),
        ("shared image drawn per sample", Case(3, 2, 2, "one", shared_image=True)),
    ],
)
def test_sabotage_is_caught(sabotage: str, case: Case) -> None:
    assert any("latents" in entry for entry in _differences(case, sabotage))


@pytest.mark.parametrize(
    "case", [Case(3, 2, 2, "list"), Case(3, 1, 2, "list", shared_image=True)], ids=str
)
def test_images_encoded_with_generators_of_other_samples(case: Case) -> None:
    # Upstream encodes image i with generator i, which another replica may hold.
    with pytest.raises(RankError, match="expected one for each image"):
        run_ranks(_replica, 2, case)


def test_ranks_with_different_generators_are_refused() -> None:
    def rank(rank: int) -> None:
        initialize_model_parallel(ParallelConfig(data_parallel_degree=2))
        values = [torch.Generator()] * (1 if rank else 0)
        with same_randomness(get_world_group(), values):
            pass

    with pytest.raises(
        RankError, match=r"generators on \['cpu'\] on rank 1 and on no dev"
    ):
        run_ranks(rank, 2)


def test_one_rank_needs_no_group() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with same_randomness(Group(), [torch.Generator()]):
        assert torch.equal(torch.get_rng_state(), before)


def _whole_and_rows(draw: Any, start: int, stop: int, batch: int) -> list[torch.Tensor]:
    results = []
    for context, rows in (
        (nullcontext(), batch),
        (rows_of_whole_batch(start, stop, batch), stop - start),
    ):
        torch.manual_seed(9)
        with context:
            results.append(draw(rows))
            results.append(torch.get_rng_state())
    return results


@pytest.mark.parametrize(
    "draw",
    {
        "randn varargs": lambda n: torch.randn(n * 2, 3),
        "randn tuple": lambda n: torch.randn((n, 3), dtype=torch.float64),
        "randn size": lambda n: torch.randn(size=(n, 3)),
        "rand": lambda n: torch.rand([n, 3]),
        "randint": lambda n: torch.randint(0, 50, (n, 3)),
        "randint high": lambda n: torch.randint(50, (n,)),
        "randint size": lambda n: torch.randint(low=0, high=50, size=(n,)),
        "randn_like": lambda n: torch.randn_like(torch.empty(n, 3)),
        "randn_like channels last": lambda n: torch.randn_like(
            torch.empty(n, 3, 4, 5).contiguous(memory_format=torch.channels_last)
        ),
        "rand_like": lambda n: torch.rand_like(torch.empty(n * 4, 3)),
        "randint_like": lambda n: torch.randint_like(torch.empty(n, 3), 50),
        "normal": lambda n: torch.normal(0.0, 2.0, (n, 3)),
        "normal size": lambda n: torch.normal(0.0, 2.0, size=(n, 3)),
        "normal_": lambda n: torch.empty(n, 3).normal_(1.0, 2.0),
        "uniform_": lambda n: torch.empty(n, 3).uniform_(-1, 1),
        "exponential_": lambda n: torch.empty(n, 3).exponential_(),
    }.items(),
    ids=lambda item: item[0],
)
def test_drawing_functions(draw: tuple[str, Any]) -> None:
    factor = len(draw[1](1))
    for start, stop, batch in ((0, 2, 5), (2, 5, 5), (4, 5, 5)):
        whole, state, rows, own_state = _whole_and_rows(draw[1], start, stop, batch)
        assert torch.equal(rows, whole[start * factor : stop * factor])
        assert rows.is_contiguous() == whole.is_contiguous()
        assert torch.equal(state, own_state)


@pytest.mark.parametrize("shape", [(), (1, 4), (3,), (0, 4)])
def test_draws_shared_by_the_batch(shape: tuple[int, ...]) -> None:
    # Two samples here: an extent of 1 or 3 cannot be theirs.
    whole, _, rows, _ = _whole_and_rows(lambda n: torch.randn(shape), 0, 2, 4)
    assert torch.equal(whole, rows)
    whole, _, rows, _ = _whole_and_rows(lambda n: torch.randperm(8), 0, 2, 4)
    assert torch.equal(whole, rows)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.multinomial(torch.ones(2, 5), 1),
        lambda: torch.bernoulli(torch.full((2, 5), 0.5)),
        lambda: torch.normal(torch.zeros(2, 5), 1.0),
        lambda: torch.randn(2, 3, out=torch.empty(2, 3)),
    ],
)
def test_draws_that_need_other_replicas_values(draw: Any) -> None:
    with (
        rows_of_whole_batch(0, 2, 4),
        pytest.raises(ValueError, match="run without data par"),
    ):
        draw()


@pytest.mark.parametrize("bounds", [(2, 2, 4), (3, 5, 4), (-1, 1, 4)])
def test_rows_outside_the_batch(bounds: tuple[int, int, int]) -> None:
    with (
        pytest.raises(ValueError, match="expected at least one"),
        rows_of_whole_batch(*bounds),
    ):
        pass


def test_torch_is_left_as_it_was() -> None:
    names = randomness._SIZED + randomness._LIKE + randomness._FROM_VALUES
    before = [getattr(torch, name) for name in names]
    with (
        pytest.raises(KeyError),
        rows_of_whole_batch(0, 1, 2),
        rows_of_whole_batch(0, 1, 2),
    ):
        assert torch.randn is not before[0]
        raise KeyError
    assert [getattr(torch, name) for name in names] == before
    assert not set(randomness._IN_PLACE) & set(vars(torch.Tensor))


def test_other_threads_draw_for_themselves() -> None:
    from threading import Thread

    drawn: list[torch.Tensor] = []
    with intercept_draws(lambda draw: torch.zeros(1)):
        thread = Thread(target=lambda: drawn.append(torch.ones(2).normal_()))
        thread.start()
        thread.join()
        assert torch.randn(3).shape == (1,)
    assert drawn[0].shape == (2,)


def test_find_generators() -> None:
    first, second = torch.Generator(), torch.Generator()
    nested = ({"a": [first, (second, first)]}, second, 3, None)
    assert {*map(id, find_generators(*nested, first))} == {id(first), id(second)}
    assert len(find_generators(*nested, first)) == 2
