"""What `icmsr upscale` says before it starts: sizes, tiles, and what is special about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from ..backbone.protocol import BackboneDescriptor
from ..pictures.files import stored_size
from ..pictures.storage import Place
from ..upscale.masking import plan_mask
from ..upscale.plan import UpscalePlan, plan_upscale
from ..upscale.settings import UpscaleSettings


class Announcer:
    """Knows from the headers of pictures what their results will be. Where memory runs short, tiles may be smaller."""

    def __init__(self, descriptor: BackboneDescriptor, settings: UpscaleSettings, mask: Tensor | None = None) -> None:
        self._descriptor, self._mask = descriptor, mask
        self._plan_of = lru_cache(maxsize=64)(
            lambda width, height: plan_upscale(descriptor, height, width, settings)  # the order of `stored_size`
        )

    def plan_of(self, path: Place) -> UpscalePlan | None:
        """The plan for a picture; None where its header cannot be read."""
        size = stored_size(path)
        return None if size is None else self._plan_of(*size)

    def bar_words(self, path: Place) -> str:
        """Name, size of the result and number of tiles, for a bar."""
        plan = self.plan_of(path)
        if plan is None:
            return path.name
        return f"{path.name} {plan.target[1]} x {plan.target[0]}, {len(plan.tiles)} tiles"

    def start_line(self, paths: Sequence[Place]) -> str | None:
        """One line about one picture or about all of them; None where no header can be read."""
        plans = [plan for plan in map(self.plan_of, paths) if plan is not None]
        if not plans:
            return None
        if len(paths) == 1:
            return "; ".join([f"{paths[0]}: {plans[0].words()}", *self._mask_words(plans[0])])
        smallest, largest = (pick(plans, key=_pixels).target for pick in (min, max))
        sizes = f"{smallest[1]} x {smallest[0]}"
        if largest != smallest:
            sizes += f" to {largest[1]} x {largest[0]}"
        line = f"{len(paths)} pictures: results of {sizes} pixels, {sum(len(plan.tiles) for plan in plans)} tiles"
        # By kind: the sizes in a remark differ from picture to picture.
        kinds = Counter(remark.kind for plan in plans for remark in plan.frame.remarks())
        return "; ".join([line, *(f"{count} {kind}" for kind, count in kinds.items())])

    def _mask_words(self, plan: UpscalePlan) -> list[str]:
        masked = None if self._mask is None else plan_mask(self._descriptor, plan, self._mask)
        return [] if masked is None else [f"the mask needs {masked.words(plan)}"]


def _pixels(plan: UpscalePlan) -> int:
    return plan.target[0] * plan.target[1]
