"""Rank cases: predict what is not done yet, then write the table and the page."""

from __future__ import annotations

import contextlib
import filecmp
import io
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from nnunet_ssl.data.image_checks import BadImageError
from nnunet_ssl.data.queue import VERDICTS, Queue, Row, case_files, write_rows
from nnunet_ssl.errors import UserError
from nnunet_ssl.files import cannot_write, replacing
from nnunet_ssl.out_of_memory import free_memory, is_out_of_memory
from nnunet_ssl.ranking.folder import Done, append_done, stamps
from nnunet_ssl.ranking.page import write_page
from nnunet_ssl.ranking.pictures import draw
from nnunet_ssl.ranking.prediction import Ensemble, PreparedCase
from nnunet_ssl.ranking.scores import LabeledRange, Scores, disagreement_map, entropy_map, judge, score

_GO_ON = "Make room there and run this again, which goes on."
_NO_MEMORY = "memory ran out"
REPLACED_FOLDER = "replaced"
"""Of the queue: each case's consensus before the last, if it is not the same."""


@dataclass(frozen=True)
class Thresholds:
    """Of the verdicts; see :func:`~nnunet_ssl.ranking.scores.judge`."""

    reliable: float
    first: float


@dataclass
class Seconds:
    """Where the time of a run went.

    Attributes:
        predicting: in nnU-Net's code: preprocessing that was waited for, the networks, and back to the image's size.
        other: all else that is done for a case.
    """

    predicting: float = 0.0
    other: float = 0.0


@dataclass
class Ranking:
    """A queue in the making.

    Attributes:
        folder: of the queue.
        raw: the dataset's folder in nnUNet_raw.
        queue: what is ranked.
        done: cases that are done.
        ranges: what the labeled cases are like.
        thresholds: of the verdicts.
        problems: reasons by case, of cases that could not be predicted.
        seconds: where the time went.
        replaced: files of an earlier consensus that were moved aside, since the case was predicted again.
    """

    folder: Path
    raw: Path
    queue: Queue
    done: dict[str, Done]
    ranges: Mapping[str, LabeledRange]
    thresholds: Thresholds
    problems: dict[str, str] = field(default_factory=dict)
    seconds: Seconds = field(default_factory=Seconds)
    replaced: list[str] = field(default_factory=list)

    def images(self, case: str) -> list[Path]:
        """The image files of a case."""
        return [self.raw / image for image in self.queue.cases[case]]

    def to_do(self) -> list[str]:
        """Cases that are not done, or whose images have changed since; what was done of those does not count more."""
        cases = [
            case
            for case in self.queue.cases
            if case not in self.done or self.done[case].stamps != stamps(self.images(case))
        ]
        for case in cases:
            self.done.pop(case, None)
        return cases

    def rows(self) -> list[Row]:
        """All cases that are done, the one to label first on top."""
        rows = []
        for case, done in self.done.items():
            verdict, reason = judge(
                done.scores,
                self.ranges,
                reliable=self.thresholds.reliable,
                first=self.thresholds.first,
                models=len(self.queue.models),
            )
            rows.append(Row(case, verdict, reason, done.scores.dice, done.scores.entropy, done.scores.structures))
        return sorted(rows, key=_order)

    def publish(self) -> list[Row]:
        """Write the table and the page of all cases that are done; returns the rows."""
        rows = self.rows()
        write_rows(self.folder, self.queue, rows)
        write_page(self.folder, self.queue, rows, self.problems)
        return rows

    def predict(self, ensemble: Ensemble, cases: Sequence[str], device: torch.device) -> None:
        """Predict cases, one after the other, while the next one is read; each is done for good when its turn is over.

        Raises:
            UserError: a file cannot be written.
        """
        progress = tqdm(
            _prepared(self, ensemble, cases), "rank", len(cases), unit="case", disable=None, file=sys.stderr
        )
        # nnU-Net prints; its lines would tear up the progress bar.
        with contextlib.redirect_stdout(io.StringIO()):
            for case, found, prepared in progress:
                begin = time.perf_counter()
                try:
                    image = prepared.result()
                    if found is None:
                        raise BadImageError("an image file is missing")
                    scores = self._one_case(ensemble, case, image, begin)
                except BadImageError as error:
                    self.problems[case] = str(error)
                    continue
                except MemoryError:
                    self.problems[case] = _NO_MEMORY
                    continue
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    self.problems[case] = f"{_NO_MEMORY} on {device}"
                    free_memory(device, compiled=False)
                    continue
                self.done[case] = Done(scores, found)
                append_done(self.folder, case, self.done[case])

    def _one_case(self, ensemble: Ensemble, case: str, prepared: PreparedCase, begin: float) -> Scores:
        """Predict a case and put its files in their places; ``begin`` is when it was first waited for."""
        prediction = ensemble.predict(prepared)
        predicted = time.perf_counter()
        labels, spacing = self.queue.structures, [float(size) for size in prepared.properties["spacing"]]
        entropy = entropy_map(prediction.probabilities, regions=ensemble.regions)
        disagreement = disagreement_map(prediction.label_maps)
        scores = score(prediction.consensus, prediction.label_maps, entropy, labels, spacing)
        files = case_files(self.folder, case, self.queue.file_ending)
        with self._placing(files.consensus, self.queue.file_ending) as file:
            ensemble.write(prediction.consensus, file, prepared.properties)
        with self._placing(files.disagreement, self.queue.file_ending) as file:
            ensemble.write(disagreement, file, prepared.properties)
        with self._placing(files.uncertainty, ".nii.gz") as file:
            ensemble.write_map(entropy, file, prepared.properties)
        with self._placing(files.picture, ".png") as file:
            draw(file, prepared.image, prediction.consensus, disagreement, labels, spacing)
        self.seconds.predicting += predicted - begin
        self.seconds.other += time.perf_counter() - predicted
        return scores

    @contextlib.contextmanager
    def _placing(self, target: Path, ending: str) -> Iterator[Path]:
        """A file in the making, with the ending by which its writer knows the format."""
        try:
            target.parent.mkdir(exist_ok=True)
            with replacing(target, aside=self.folder / "work" / f"unfinished{ending}") as unfinished:
                yield unfinished
                if target.parent.name == "consensus":
                    self._keep(target, unfinished)
        except BadImageError as error:
            raise UserError(f"{target} cannot be written. {_GO_ON} In detail: {error}") from error
        except OSError as error:
            raise cannot_write(target, error, _GO_ON) from error

    def _keep(self, earlier: Path, new: Path) -> None:
        """Move an earlier consensus that is not the same aside: a person may have corrected it."""
        if earlier.is_file() and not filecmp.cmp(earlier, new, shallow=False):
            kept = self.folder / REPLACED_FOLDER / earlier.name
            kept.parent.mkdir(exist_ok=True)
            earlier.replace(kept)
            self.replaced.append(earlier.name)


def _prepared(
    ranking: Ranking, ensemble: Ensemble, cases: Sequence[str]
) -> Iterator[tuple[str, tuple[tuple[int, int], ...] | None, Future[PreparedCase]]]:
    """Each case with its image files' stamps, taken before they are read; the next one is read meanwhile."""
    with ThreadPoolExecutor(1) as reader:

        def begin(case: str) -> tuple[str, tuple[tuple[int, int], ...] | None, Future[PreparedCase]]:
            files = ranking.images(case)
            return case, stamps(files), reader.submit(ensemble.prepare, files)

        following = [begin(case) for case in cases[:1]]
        for index in range(len(cases)):
            current = following.pop()
            following += [begin(case) for case in cases[index + 1 : index + 2]]
            yield current


def _order(row: Row) -> tuple[int, float, float, str]:
    """By verdict, then by Dice from below, or, of one model, by entropy from above."""
    dice = -1.0 if math.isnan(row.dice) else row.dice
    entropy = 0.0 if math.isnan(row.entropy) else row.entropy
    return VERDICTS.index(row.verdict), dice, -entropy, row.case
