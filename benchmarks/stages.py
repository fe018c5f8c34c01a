"""Measures the seconds that each stage of proposal generation takes."""

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager

import torch
from sharpmask_d2.inference import predictor
from sharpmask_d2.modeling import segment_generator
from sharpmask_d2.modeling.meta_arch import SegmentProposalNetwork

# In the order in which they run. "windows" is all other time: choosing windows and cutting them out of the features.
STAGES = ("pyramid", "trunk", "score", "horizontal", "refinement", "boxes", "windows")


class StageClock:
    """Measures a model that generates proposals of full images, without timing code in the model.

    Inside `with clock:` the methods that make up a stage are replaced by timed ones. Time of a stage inside another one counts for the
    inner one only. On a GPU every stage ends with a synchronisation, so that the sum is a little more than an unmeasured run takes.
    Each thread has stages of its own, which may overlap those of other threads; a stage should run in one thread only.
    """

    def __init__(self, model, also: Sequence[tuple] = ()):
        """
        Args:
            model: SharpMaskProposalNetwork or SegmentProposalNetwork.
            also: (stage, object, name of its function or method) of more stages; none by default.
        """
        self.model = model
        self.seconds = defaultdict(float)
        self._also = also
        self._threads = threading.local()

    @property
    def _running(self) -> list:
        """[stage, time at which it began or was resumed] of the stages of this thread, the outermost first."""
        if not hasattr(self._threads, "running"):
            self._threads.running = []
        return self._threads.running

    def __enter__(self) -> "StageClock":
        self._patches = ExitStack()
        for stage, owner, name in [*_parts(self.model), *self._also]:
            self._patches.enter_context(self._replaced(owner, name, stage))
        return self

    def __exit__(self, *error) -> None:
        self._patches.close()

    @contextmanager
    def stage(self, name: str):
        """A context whose time belongs to the stage `name`."""
        now = self._now()
        if self._running:
            self.seconds[self._running[-1][0]] += now - self._running[-1][1]
        self._running.append([name, now])
        try:
            yield
        finally:
            now = self._now()
            name, started = self._running.pop()
            self.seconds[name] += now - started
            if self._running:
                self._running[-1][1] = now

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def _replaced(self, owner, name: str, stage: str):
        plain, own = getattr(owner, name), name in vars(owner)

        def timed(*args, **kwargs):
            with self.stage(stage):
                return plain(*args, **kwargs)

        setattr(owner, name, timed)
        try:
            yield
        finally:
            if own:
                setattr(owner, name, plain)
            else:
                # The method of the class shows again.
                delattr(owner, name)


def _parts(model) -> list:
    """(stage, object, name of its method) of everything that belongs to a stage."""
    if isinstance(model, SegmentProposalNetwork):
        generator = model.proposal_generator
        return [
            ("pyramid", predictor, "prepare_image"),
            ("trunk", model.backbone, "forward"),
            ("score", generator, "encode"),
            ("horizontal", generator.decoder, "tables"),
            ("refinement", generator.decoder, "masks"),
            ("boxes", segment_generator, "build_proposals"),
        ]
    network = model.pyramid.network
    return [
        ("pyramid", predictor, "prepare_image"),
        ("pyramid", model.pyramid, "level_image"),
        ("trunk", network.trunk, "forward"),
        ("score", network.head, "forward"),
        ("horizontal", network.mask_branch, "horizontal"),
        ("refinement", network.mask_branch, "forward"),
        ("boxes", segment_generator, "build_proposals"),
    ]
