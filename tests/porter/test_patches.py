"""Loops whose steps cannot be cut into patches, each with the line that says why."""

from __future__ import annotations

import pytest

from porter.analysis.pipeline_source import analyse_pipeline
from porter.parsed import ParsedModule

PIPELINE = """
class ToyPipeline(DiffusionPipeline):
    def __call__(self, prompt=None, output_type="pil"):
        batch_size = len(prompt)
        latents = self.prepare_latents(batch_size)
        with self.progress_bar(total=8) as progress_bar:
            for i, t in enumerate(self.scheduler.timesteps):
                noise_pred = self.transformer(latents, timestep=t)[0]
                {line}
                latents = self.scheduler.step(noise_pred, t, latents)[0]
                progress_bar.update()
        return self.vae.decode(latents)
"""


def refusal(line: str) -> str:
    module = ParsedModule("toy", "toy.py", PIPELINE.format(line=line))
    shape = analyse_pipeline(module, "ToyPipeline", ["transformer"])
    return shape.refused_modes.get("pipefusion", "")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("self.scheduler._step_index -= 1", "self.scheduler._step_index"),
        ("self.scheduler.outputs[0] = noise_pred", "self.scheduler.outputs[0]"),
        (
            "self.scheduler.last = done = noise_pred",
            "self.scheduler.last",
        ),
    ],
)
def test_a_scheduler_that_the_loop_sets_is_refused(line: str, found: str) -> None:
    assert refusal(line) == f"toy.py:9: {found} is set in the loop"


@pytest.mark.parametrize("line", ["self._current = t", "scheduler = self.scheduler"])
def test_what_is_no_part_of_the_scheduler_may_be_set(line: str) -> None:
    assert refusal(line) == ""
