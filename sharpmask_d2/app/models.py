"""The packaged models, each loaded once and shared by all users."""

import threading

from .. import model_zoo
from ..inference import ProposalPredictor
from ..modeling.meta_arch import ALONE, SegmentProposalNetwork


class SharedModels:
    """Predictors of the packaged models that make proposals. Threads may share an instance."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: dict[str, ProposalPredictor] = {}

    @staticmethod
    def names() -> list[str]:
        """The models that the page offers, the default first."""
        proposal_models = [
            name for name in model_zoo.names() if model_zoo.get_config(name).MODEL.META_ARCHITECTURE in ALONE
        ]
        return sorted(proposal_models, key=lambda name: (name != model_zoo.DEFAULT, name))

    def get(self, name: str) -> ProposalPredictor:
        """Returns the predictor of a model, and loads it if it is the first time.

        Raises:
            UserError: there is no such packaged model.
        """
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = ProposalPredictor(model_zoo.get_config(name))
            return self._loaded[name]


def takes_prompts(predictor: ProposalPredictor) -> bool:
    """Whether a model makes masks of points and boxes: only those on a feature pyramid do."""
    return isinstance(predictor.model, SegmentProposalNetwork)
