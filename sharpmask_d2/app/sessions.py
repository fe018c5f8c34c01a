"""What each user of the page works on: a photograph, its masks, and the prompts.

Shape letters: H W image.
"""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Optional

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from .. import model_zoo
from ..errors import UserError
from ..inference import SharpMaskAutomaticMaskGenerator, SharpMaskPredictor
from ..inference.automatic_mask_generator import suppress
from .models import SharedModels, takes_prompts
from .photographs import Photograph, picture

EVERYTHING, POINT, BOX = "everything", "point", "box"
# Names of the masks of a point, by their size.
CHOICES = ("part", "object", "group")
# Lowest score of a mask of everything that the page can show, and maximum number of masks.
LOWEST_SCORE = 0.3
MAX_MASKS = 50
_MAX_KEPT = 200
# Number of proposals of a model on an image pyramid among which masks of everything are chosen.
_PROPOSALS = 300


class Mask:
    """A mask with its score.

    Attributes:
        rle: compressed RLE of the size of the image.
        score: in 0..1.
    """

    def __init__(self, rle: dict[str, Any], score: float):
        self.rle, self.score = rle, score

    @cached_property
    def area(self) -> int:
        """Number of pixels."""
        return int(mask_utils.area(self.rle))

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """Tight box: x, y, width, height in pixels."""
        x, y, width, height = (int(value) for value in mask_utils.toBbox(self.rle))
        return x, y, width, height

    def bitmap(self) -> np.ndarray:
        """(H, W) uint8 of 0 and 1."""
        return mask_utils.decode(self.rle)

    def crop(self) -> np.ndarray:
        """The bitmap in the tight box, (height, width) uint8 of 0 and 1."""
        x, y, width, height = self.box
        return self.bitmap()[y : y + height, x : x + width]

    @cached_property
    def centre(self) -> tuple[float, float]:
        """The pixel farthest from the border of the mask, x and y in pixels."""
        inside = cv2.distanceTransform(np.pad(self.crop(), 1), cv2.DIST_L2, 3)
        row, column = np.unravel_index(int(inside.argmax()), inside.shape)
        return self.box[0] + float(column) - 0.5, self.box[1] + float(row) - 0.5


class Prompt(NamedTuple):
    """A point or a box and its masks."""

    kind: str  # POINT or BOX
    values: tuple[float, ...]  # x, y; or x0, y0, x1, y1; in pixels
    masks: list[Mask]  # of a point by ascending area, of a box one; none is empty
    chosen: int


class Session:
    """The work of one user. Every method may be called from any thread, and they wait for one another.

    Attributes:
        mode: EVERYTHING, POINT or BOX: what is shown and downloaded.
        photograph: None until one is opened.
        picture: JPEG file of the photograph for the browser.
        picture_id: secret name of the picture.
        kept: masks of prompts that the user keeps.
    """

    def __init__(self, models: SharedModels):
        self._lock = threading.RLock()
        self._models = models
        self.model = model_zoo.DEFAULT
        self.mode = EVERYTHING
        self.photograph: Optional[Photograph] = None
        self.picture, self.picture_id = b"", ""
        self._everything: Optional[list[Mask]] = None
        self._encoder: Optional[SharpMaskPredictor] = None
        self.prompt: Optional[Prompt] = None
        self.kept: list[Mask] = []

    def open(self, photograph: Photograph) -> None:
        """Replaces the photograph, and forgets all masks."""
        with self._lock:
            self.photograph = photograph
            self.picture, self.picture_id = picture(photograph.pixels), secrets.token_urlsafe(18)
            self.kept = []
            self._forget_model()

    def set_model(self, name: str) -> None:
        """Chooses a packaged model. Masks that are kept stay.

        Raises:
            UserError: there is no such model.
        """
        with self._lock:
            self._models.get(name)
            if name != self.model:
                self.model = name
                self._forget_model()

    def everything(self) -> list[Mask]:
        """The masks of everything, best first; computed once.

        Raises:
            UserError: no photograph is open.
        """
        with self._lock:
            if self._everything is None:
                self._everything = self._find_everything()[:MAX_MASKS]
            return self._everything

    def ask(self, kind: str, values: Sequence[Optional[float]]) -> None:
        """Finds the masks of a point or a box. Of three masks of a point, the one of highest score is chosen.

        Args:
            kind: POINT or BOX.
            values: x, y of a point or x0, y0, x1, y1 of a box in pixels; the corners of a box may be any two that face each other.

        Raises:
            UserError: no photograph is open, a number is missing, the point lies outside of the photograph, the box has no area in it, the
                model makes no masks of prompts, or there is no mask.
        """
        with self._lock:
            self.prompt = None
            prompt = self._read_prompt(kind, values)
            encoder = self._encoded()
            found = encoder.predict_masks(points=[prompt]) if kind == POINT else encoder.predict_masks(boxes=[prompt])
            masks = [
                Mask(rle, float(score))
                for rle, score, some in zip(found.masks.rle(), found.scores[0], found.masks.nonempty())
                if some
            ]
            if not masks:
                raise UserError(f"The model finds no mask of this {kind}.")
            best = max(range(len(masks)), key=lambda i: masks[i].score)
            order = sorted(range(len(masks)), key=lambda i: masks[i].area)
            self.prompt = Prompt(kind, tuple(prompt), [masks[i] for i in order], order.index(best))

    def choose(self, number: Optional[int]) -> None:
        """Chooses among the masks of the prompt, by their number from 0."""
        with self._lock:
            if self.prompt is not None and number is not None and 0 <= number < len(self.prompt.masks):
                self.prompt = self.prompt._replace(chosen=number)

    def keep(self) -> None:
        """Adds the chosen mask of the prompt to the masks that are kept, and removes the prompt.

        Raises:
            UserError: there is no prompt, or too many masks are kept.
        """
        with self._lock:
            if self.prompt is None:
                raise UserError("There is no mask to keep: choose a point or a box first.")
            if len(self.kept) >= _MAX_KEPT:
                raise UserError(f"{_MAX_KEPT} masks are kept already: download them, and remove them.")
            self.kept.append(self.prompt.masks[self.prompt.chosen])
            self.prompt = None

    def clear(self) -> None:
        """Removes the prompt and the masks that are kept."""
        with self._lock:
            self.prompt, self.kept = None, []

    def shown(self, count: int, min_score: float) -> list[Mask]:
        """The masks that the page shows and downloads in the present mode.

        Args:
            count: maximum number of masks of everything.
            min_score: lowest score of these masks.

        Returns:
            In the mode EVERYTHING the best masks of everything, best first; else the masks that are kept, then the prompt's chosen one.

        Raises:
            UserError: no photograph is open.
        """
        with self._lock:
            if self.mode == EVERYTHING:
                return [mask for mask in self.everything() if mask.score >= min_score][: max(int(count), 0)]
            self._opened()
            return self.kept + ([self.prompt.masks[self.prompt.chosen]] if self.prompt else [])

    def _forget_model(self) -> None:
        self._everything = self._encoder = self.prompt = None

    def _opened(self) -> Photograph:
        if self.photograph is None:
            raise UserError("No photograph is open: choose one. (After a long pause, the page forgets the photograph.)")
        return self.photograph

    def _find_everything(self) -> list[Mask]:
        pixels = self._opened().pixels
        predictor = self._models.get(self.model)
        if takes_prompts(predictor):
            generator = SharpMaskAutomaticMaskGenerator(predictor, pred_iou_thresh=LOWEST_SCORE, output_mode="coco_rle")
            return [Mask(record["segmentation"], record["predicted_iou"]) for record in generator.generate(pixels)]
        proposals = predictor(pixels)[:_PROPOSALS]
        scores = proposals.objectness_logits.sigmoid().tolist()
        rles = proposals.proposal_masks.rle()
        masks = [Mask(rles[i], scores[i]) for i in suppress(rles, 0.5)]
        return [mask for mask in masks if mask.area > 0 and mask.score >= LOWEST_SCORE]

    def _encoded(self) -> SharpMaskPredictor:
        if self._encoder is None:
            predictor = self._models.get(self.model)
            if not takes_prompts(predictor):
                raise UserError(
                    f"The model {self.model} makes no masks of points and boxes: choose {model_zoo.DEFAULT} for them."
                )
            encoder = SharpMaskPredictor(predictor)
            encoder.set_image(self._opened().pixels)
            self._encoder = encoder
        return self._encoder

    def _read_prompt(self, kind: str, values: Sequence[Optional[float]]) -> list[float]:
        height, width = self._opened().pixels.shape[:2]
        numbers = [float(value) for value in values if value is not None]
        if len(numbers) != (2 if kind == POINT else 4) or not np.isfinite(numbers).all():
            raise UserError(f"Give {'x and y of the point' if kind == POINT else 'both corners of the box'} in pixels.")
        if kind == POINT:
            x, y = numbers
            if not (0 <= x <= width and 0 <= y <= height):
                raise UserError(f"The point lies outside of the photograph of {width} x {height} pixels.")
            return [x, y]
        x0, x1 = (min(max(x, 0), width) for x in sorted(numbers[0::2]))
        y0, y1 = (min(max(y, 0), height) for y in sorted(numbers[1::2]))
        if x1 - x0 < 1 or y1 - y0 < 1:
            raise UserError(f"The box has no area in the photograph of {width} x {height} pixels.")
        return [x0, y0, x1, y1]


class Sessions:
    """The sessions of all users, of which the oldest unused one is forgotten when there are too many."""

    def __init__(self, models: SharedModels, *, capacity: int):
        """
        Args:
            models: shared by all sessions.
            capacity: maximum number of sessions in memory.
        """
        self._models, self._capacity = models, capacity
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def get(self, token: str) -> Session:
        """Returns the session of a user, a new one if it is not known (any more).

        Args:
            token: secret name of the session.
        """
        with self._lock:
            session = self._sessions.pop(token, None) or Session(self._models)
            self._sessions[token] = session
            while len(self._sessions) > self._capacity:
                self._sessions.popitem(last=False)
            return session

    def forget(self, token: str) -> None:
        """Removes a session, if it is there."""
        with self._lock:
            self._sessions.pop(token, None)

    def picture(self, picture_id: str) -> Optional[bytes]:
        """The picture of this secret name; None if there is none."""
        with self._lock:
            return next((s.picture for s in self._sessions.values() if s.picture and s.picture_id == picture_id), None)

    def __len__(self) -> int:
        return len(self._sessions)
