"""What the rules for pipelines are given: the source's shape and the probe's facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import libcst as cst

from porter.analysis.facts import PipelineFacts
from porter.analysis.helpers import helper_calls
from porter.analysis.pipeline_modes import shared_latents
from porter.analysis.pipeline_source import PipelineSource

#: Modes in which several ranks make one call of the transformer.
OF_ONE_CALL = ("ulysses", "ring", "pp", "pipefusion")


def measured_as(cfg_style: str) -> str:
    """How a run shows the guidance that the source shows as `cfg_style`."""
    # A guider's entries are calls one after the other, too.
    return "sequential" if cfg_style == "entries" else cfg_style


#: Measured styles that a doubled call shows.
_DOUBLED = ("batched", "carried", "padded")


@dataclass(frozen=True)
class PipelineContext:
    """A pipeline as its source shows it and as a run of the shrunken model measured it."""

    source: PipelineSource
    facts: PipelineFacts

    @property
    def cfg_style(self) -> str:
        """How guidance is split; "none" unless source and measurement agree."""
        measured = self.facts.cfg_style
        if measured == "padded" and not self.split_helpers:
            return "none"
        if measured in _DOUBLED:
            measured = "batched"
        shown = measured_as(self.source.cfg_style)
        return self.source.cfg_style if shown == measured else "none"

    @property
    def split_helpers(self) -> Mapping[cst.Call, str]:
        """The helper calls that each rank makes for its branch alone, with the helper's name.

        Where each branch is padded to its own length, all that makes tensors for the
        transformer's call must have seen that branch alone; it may feed nothing else.
        """
        loop = self.source.denoising
        if self.facts.cfg_style != "padded" or loop is None:
            return {}
        return helper_calls(self.source.module, loop, self.facts.cfg_helper_axes)

    @property
    def refused_modes(self) -> Mapping[str, str]:
        """Mode to the reason why this port lacks it."""
        refused = dict(self.source.refused_modes)
        if self.cfg_style == "none" and "cfg" not in refused:
            where = self.source.where
            seen = {
                "none": "no guidance was measured",
                "single": "no second branch: a step calls the transformer alike with guidance"
                " and without it",
                "padded": "tensors beside a list are padded to the longest of both branches",
                "coupled": "a branch of the doubled batch gives another result alone",
                "carried": "the latents carry both branches, in a form that the source"
                " does not show",
                "batched": "a doubled batch was measured, not what the source shows",
                "sequential": "two calls were measured, not what the source shows",
            }
            refused["cfg"] = f"{where}: {seen[self.facts.cfg_style]}"
        for mode in ("pp", "pipefusion") if self.facts.no_stages else ():
            refused.setdefault(mode, f"{self._call}: {self.facts.no_stages}")
        for transformer in self.facts.transformers.values():
            for mode, reason in transformer.mixing.refused.items():
                refused.setdefault(mode, reason)
            for mode in OF_ONE_CALL if transformer.whole else ():
                refused.setdefault(mode, transformer.whole)
        if "pipefusion" not in refused and (blocks := self._uncut()):
            where = self._call
            refused["pipefusion"] = (
                f"{where}: the tokens in {blocks} are no whole rows of the latents"
            )
        return refused

    @property
    def shared(self) -> str:
        """When every stage gets the whole latents; see `shared_latents`."""
        if "pp" in self.refused_modes:
            return ""
        return shared_latents(self.source.rewritten_loop, self.facts.helpers)

    @property
    def _call(self) -> str:
        """`file:line` of the first transformer call, or of the loop."""
        loop = self.source.denoising
        if loop is None:
            return self.source.where
        return self.source.module.where(loop.calls[0].call)

    def _uncut(self) -> str:
        """A block list whose tokens no rows of the latents cut, or ''."""
        return next(
            (
                loop.blocks
                for transformer in self.facts.transformers.values()
                for loop in transformer.loops
                if not loop.rows
            ),
            "",
        )
