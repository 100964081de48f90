"""The data seam of a stream without phases: records are trained as they arrive, replayed ones among them at an exact
ratio. There is no epoch; the run ends with its last step, or when nothing has come for long.

Rank 0 reads; every rank gets every record, encodes it and offers it to its buffer, so all have the same.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from torchtune_agent.continual.arrivals import Arrival, Position, Reader
from torchtune_agent.continual.buffer import ReplayBuffer
from torchtune_agent.continual.learner import class_shares
from torchtune_agent.continual.mixing import INFO, Mixer, Pick, info_of, kept_info
from torchtune_agent.continual.stream import StepWork
from torchtune_agent.data import AgentSFTTransform, Collator, StepPlan
from torchtune_agent.data.collate import Batch
from torchtune_agent.data.dataset import as_sample
from torchtune_agent.data.joined import SampleInfo
from torchtune_agent.data.quarantine import DataReport, write_quarantine
from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.distributed import on_main

_SLICE = 2.0  # seconds between two looks at whether the run is asked to stop

Sample = Mapping[str, Any]


class LiveSource:
    """A BatchSource of records that arrive.

    Args:
        reader: where they come from; used by rank 0.
        transform: makes samples of a record.
        collator, plan: see SampleLoader.
        buffer: see ReplaySource.
        replay_ratio: tells the replayed rows' share of those that come next, once there is something to replay.
        max_steps: the run's length, for schedules.
        patience_seconds: a step that lacks rows is trained without them when no further record has come for so long.
        idle_seconds: the run ends when none has come for so long.
        seed: of what is drawn.
        work: see stream.StepWork.
        is_asked_to_stop: whether any rank is; all call it together. Nobody waits for records then.
        quarantine: the file for records that cannot be trained on.
        importance: of new samples; `ssis` needs it.
    """

    def __init__(
        self,
        reader: Reader,
        transform: AgentSFTTransform,
        collator: Collator,
        plan: StepPlan,
        buffer: ReplayBuffer,
        *,
        replay_ratio: Callable[[], Fraction],
        max_steps: int,
        patience_seconds: float,
        idle_seconds: float,
        seed: int,
        work: StepWork,
        is_asked_to_stop: Callable[[], bool],
        quarantine: Path,
        importance: Callable[[Sequence[Sample]], Sequence[float]] | None = None,
    ) -> None:
        self._reader, self._transform, self._buffer = reader, transform, buffer
        self._mixer = Mixer(collator, plan, lambda sample: sample, info_of)
        self._ratio, self._max_steps = replay_ratio, max_steps
        self._patience, self._idle, self._seed = patience_seconds, idle_seconds, seed
        self._work, self._quarantine, self._importance = work, quarantine, importance
        self._is_asked_to_stop = is_asked_to_stop
        self._report = DataReport()
        self._num_steps = self._num_rows = self._num_new = 0
        self._owed = Fraction(0)  # of a replayed row
        self._position: Position = {}
        self._waiting: list[Sample] = []  # of a record that made more samples than a step had room for

    @property
    def rows_per_step(self) -> int:
        return self._mixer.plan.rows_per_step

    @property
    def num_rows(self) -> int:
        """If enough comes."""
        return self._max_steps * self.rows_per_step

    def fingerprint(self) -> str:
        """Nobody knows yet what will come."""
        return "records that arrive"

    def epoch(self, number: int, first_row: int = 0) -> Iterator[list[Batch]]:
        on_main(lambda: self._reader.start(self._position))
        try:
            while self._num_steps < self._max_steps and (rows := self._next_rows()):
                self._num_steps += 1
                self._work.step_begins([pick for row in rows for pick in row])
                yield self._mixer.step(rows)
                self._work.step_ended()
        finally:
            self._reader.close()

    def _next_rows(self) -> list[list[Pick]]:
        """Those of a step; none where the stream has ended."""
        room = self.rows_per_step
        ratio = self._ratio()
        wanted = room - (int(self._owed + room * ratio) if len(self._buffer) else 0)
        new = self._arrived(wanted)
        rows: list[list[Pick]] = []
        if wanted and not new:
            return rows
        while len(rows) < room:
            owed = self._owed + ratio
            if owed >= 1 and len(self._buffer):
                rows.append([self._drawn()])
            elif new:
                sample = new.pop(0)
                self._offer(sample)
                rows.append([Pick(sample)])
            else:  # fewer came than were wanted
                break
            self._owed = owed % 1
            self._num_rows += 1
        self._waiting = new
        return rows

    def _drawn(self) -> Pick:
        drawn = self._buffer.draw(1, key=[self._num_rows], progress=self._num_steps / self._max_steps)
        age = int(drawn.ages[0])
        number = self._buffer.num_offered - age
        return Pick(drawn.samples[0], float(drawn.weights[0]), age, int(drawn.slots[0]), number)

    def _arrived(self, wanted: int) -> list[Sample]:
        """Samples of records as they come: as many as are wanted, fewer when no more have come for a while or the run
        is to stop, none when the stream has ended."""
        samples, last = self._waiting, time.monotonic()
        while len(samples) < wanted:
            limit = self._patience if samples else self._idle
            waited = time.monotonic() - last
            lacking, seconds = wanted - len(samples), max(0.0, min(_SLICE, limit - waited))
            arrivals, is_over = on_main(lambda n=lacking, s=seconds, w=waited, m=limit: self._take(n, s, w, m))
            for arrival in arrivals:
                samples = [*samples, *self._encoded(arrival)]
                self._position = arrival.position
            last = time.monotonic() if arrivals else last
            if not arrivals and (is_over or self._is_asked_to_stop()):
                break
        return samples

    def _take(self, most: int, seconds: float, waited: float, limit: float) -> tuple[list[Arrival], bool]:
        """On rank 0: what there is, and whether waiting is over, by this rank's clock."""
        taken = self._reader.take(most, seconds)
        return taken, self._reader.has_ended or (not taken and waited + seconds >= limit)

    def _encoded(self, arrival: Arrival) -> list[Sample]:
        self._report.num_read += 1
        try:
            if arrival.problem is not None:
                raise arrival.problem
            found, _ = self._transform.encode(arrival.data)
        except BadRecord as error:
            self._report.leave_out(arrival.where, error, json.dumps(arrival.data, default=str))
            on_main(lambda: write_quarantine(self._report.left_out, self._quarantine))
            return []
        source = arrival.where.split(":")[0]
        infos = [SampleInfo(arrival.where, one.origin or source, tuple(one.tools)) for one in found]
        return [_kept(as_sample(one)) | {INFO: kept_info(info)} for one, info in zip(found, infos, strict=True)]

    def _offer(self, sample: Sample) -> None:
        self._num_new += 1
        needs = self._buffer.needs
        self._buffer.offer(
            sample,
            importance=None if self._importance is None else float(self._importance([sample])[0]),
            tools=sample[INFO][2] if needs == "tools" else None,
            class_shares=class_shares(sample["token_class"]) if needs == "class_shares" else None,
        )

    def facts(self) -> dict[str, float]:
        found = {"stream_samples": float(self._num_new), "stream_bad_records": float(len(self._report.left_out))}
        return found | self._work.facts()

    def state_dict(self) -> dict[str, Any]:
        """Equal on every rank, which all take part."""
        self._work.step_ended()
        owed = [self._owed.numerator, self._owed.denominator]
        counts = {
            "owed": owed,
            "steps": self._num_steps,
            "rows": self._num_rows,
            "new": self._num_new,
            "position": self._position,
        }
        # What waits has been read already: a buffer's form is one that a checkpoint can hold.
        waiting = ReplayBuffer(len(self._waiting) + 1)
        for sample in self._waiting:
            waiting.offer(sample)
        return {
            "live": json.dumps(counts),
            "buffer": self._buffer.state_dict(),
            "waiting": waiting.state_dict(),
            "work": self._work.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        counts = json.loads(state["live"])
        self._num_steps, self._num_rows, self._num_new = counts["steps"], counts["rows"], counts["new"]
        self._position, self._owed = counts["position"], Fraction(*counts["owed"])
        self._buffer.load_state_dict(state["buffer"])
        waiting = ReplayBuffer(1_000_000)
        waiting.load_state_dict(state["waiting"])
        self._waiting = waiting.samples()
        self._work.load_state_dict(state["work"])


def _kept(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {key: np.asarray(sample[key]) for key in ("tokens", "labels", "token_class", "call_index", "weights")}
