"""The whole pipeline: teacher → annotate → train → evaluate, round after round, and a control without soft labels.

    DIR/recipe.toml            resolved
    DIR/teacher/               only if the teacher is trained from the labels
    DIR/round-1/store/         the teacher's soft labels; beside it calibration.json and selection/ if asked for
    DIR/round-1/student/       a run directory; the next round's teacher
    DIR/control/               the same student from the labels alone, for as many steps
    DIR/evaluations/           what each model reached on which shards
    DIR/run.json               written last: the table

Each stage is skipped if it is done: a store knows its fingerprint, a run directory its own, an evaluation the hashes
of model and shards, so there is no other bookkeeping to go wrong. The same command after a kill goes on where it
stopped; with a changed recipe it refuses to mix the old with the new.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict

import tomli_w

from pseudolabel import specs, storage
from pseudolabel.annotate import annotate
from pseudolabel.checkpoint import read_card
from pseudolabel.classes.names import read_classes
from pseudolabel.classes.space import named_beside
from pseudolabel.errors import OutputExists
from pseudolabel.evaluations import Evaluations
from pseudolabel.interfaces import Teacher
from pseudolabel.labels.store import open_store
from pseudolabel.place import Place, Quiet, Watcher
from pseudolabel.recipe import Recipe, differences
from pseudolabel.run_result import Round, RunResult, table
from pseudolabel.settings import TrainSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.storage import Location
from pseudolabel.teachers import parse_teachers
from pseudolabel.train import TrainResult, train
from pseudolabel.training.inputs import check_labeled
from pseudolabel.training.setup import check_before_annotating
from pseudolabel.training.step_times import advice, summary
from pseudolabel.training.tracking import grouped
from pseudolabel.trusting import Trust, known_leaks, needs_evidence, settle_trust


def run(
    recipe: Recipe, out: str | os.PathLike[str], place: Place | None = None, watcher: Watcher | None = None
) -> RunResult:
    """Run all stages of `recipe` in the directory `out`; finished stages are skipped.

    Raises:
        OutputExists: `out` holds another recipe's run.
        RecipeError: the recipe contradicts its data.
    """
    started = time.monotonic()
    pipeline = _Pipeline(recipe, storage.location(out), place or Place(), watcher or Quiet())
    pipeline.check()
    with storage.held(pipeline.out):
        return _run(pipeline, started)


def _run(pipeline: _Pipeline, started: float) -> RunResult:
    recipe, out = pipeline.recipe, pipeline.out
    pipeline.claim()
    teacher_uris, teacher_row = pipeline.first_teacher()
    rounds: list[Round] = []
    steps = 0
    for number in range(1, recipe.rounds.count + 1):
        row, trained = pipeline.round(number, teacher_uris)
        rounds.append(row)
        steps = trained.steps
        teacher_uris = [_as_teacher(pipeline.out / f"round-{number}" / "student", recipe.train.student)]
    control = pipeline.control(steps) if recipe.rounds.control else None
    result = RunResult(os.fspath(out), tuple(rounds), control, teacher_row, round(time.monotonic() - started, 3))
    content = {
        "format_version": 1,
        "kind": "run",
        "fingerprint": pipeline.fingerprint,
        "recipe": recipe.model_dump(mode="json"),
        "table": table(result),
        **asdict(result),
    }
    storage.write_atomic(pipeline.out / "run.json", json.dumps({**content, "out": None}, indent=1) + "\n")
    return result


class _Pipeline:
    """A recipe with its data listed and its directory."""

    def __init__(self, recipe: Recipe, out: Location, place: Place, watcher: Watcher) -> None:
        self.recipe, self.out, self.place, self.watcher = recipe, out, place, watcher
        data = recipe.data
        self.labeled, self.unlabeled, self.val = map(list_shards, (data.labeled, data.unlabeled, data.val))
        self.test = list_shards(data.test) if data.test is not None else None
        if {shard.path for shard in self.test or ()} & {shard.path for shard in self.val}:
            watcher.stage("note: val and test share shards: test accuracies are of images that chose the weights")
        self.classes = read_classes(data.classes) if data.classes is not None else None
        self.leaks = known_leaks(data.leaks, watcher.stage)
        self.evaluations = Evaluations(out / "evaluations", place.device)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.recipe.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        """Refuse what can be seen to contradict itself, before anything is written or labeled."""
        check_before_annotating(
            self.recipe.train,
            self.recipe.annotate,
            self.classes or named_beside(self.labeled),
            calibrated=self.recipe.calibrate is not None,
            device=self.place.device,
        )
        if self.recipe.teacher.train is None:  # or else that training checks them
            check_labeled(self.labeled, len(self.classes) if self.classes is not None else None)

    def claim(self) -> None:
        """Write the recipe, or find it. Raises `OutputExists` for another one."""
        for directory in (self.out, self.evaluations.directory):
            storage.remove_stale(directory)
        path = self.out / "recipe.toml"
        if path.exists() and not path.is_file():
            raise OutputExists(f"{path}: is not a recipe; choose another --out")
        text = tomli_w.dumps(self.recipe.model_dump(mode="json", exclude_none=True))
        if path.exists():
            text_there = path.read_text(encoding="utf-8", errors="replace")
            if text_there != text:
                raise OutputExists(
                    f"{self.out}: holds the run of another recipe; what differs:\n"
                    + "\n".join(f"  {line}" for line in differences(text_there, text)[:2])
                    + "\nchoose another --out, or the old recipe"
                )
            return
        if self.out.exists() and any(
            path.name.startswith(("round-", "control", "teacher", "evaluations", "run.json"))
            for path in self.out.iterdir()
        ):
            raise OutputExists(f"{self.out}: holds stages of a run but no recipe.toml; choose another --out")
        storage.write_atomic(path, text)

    def first_teacher(self) -> tuple[list[str], Round | None]:
        """The specs of round 1's teacher; trained from the labels if the recipe says so."""
        own = self.recipe.teacher.train
        if own is None:
            uris = list(self.recipe.teacher.specs)
            return uris, self._given_teacher(uris)
        self.watcher.stage(f"teacher: training on the labels alone{_done(self.out / 'teacher')}")
        result = self._train(own, self.out / "teacher")
        return [_as_teacher(self.out / "teacher", own.student)], self._row(
            0, "labels alone", own.student, self.out / "teacher", result
        )

    def _given_teacher(self, uris: list[str]) -> Round | None:
        """A row for the table, where the teacher is one of our models."""
        spec = specs.parse(uris[0])
        if len(uris) != 1 or spec.scheme != "checkpoint" or "@" in spec.name:
            return None
        directory = storage.location(spec.name)
        self.watcher.stage("teacher: evaluating")
        trusted = dict(spec.args).get("trust_code") is True
        val, test = (
            self.evaluations.accuracy(name, directory, shards, trust_code=trusted)
            for name, shards in (("teacher-val", self.val), ("teacher", self.test))
        )
        card, _ = read_card(directory)
        parameters = sum(parameter.numel() for parameter in card.build().parameters())
        return Round(0, "given", card.student, parameters, val, test, 0.0)

    def round(self, number: int, teacher_uris: list[str]) -> tuple[Round, TrainResult]:
        """Annotate the unlabeled shards with the teacher, train a student from the soft labels."""
        directory = self.out / f"round-{number}"
        teacher: Teacher = parse_teachers(teacher_uris)
        shards = [*self.unlabeled, *(self.val if needs_evidence(self.recipe) else ())]
        self.watcher.stage(f"round {number}: annotating {len(shards)} shards with {teacher.uri}", shards)
        annotated = annotate(
            shards,
            teacher,
            directory / "store",
            engine=self.place.engine,
            settings=self.recipe.annotate,
            max_reject_fraction=self.recipe.rounds.max_reject_fraction,
            on_progress=self.watcher.annotating,
        )
        store = open_store(directory / "store")
        trust = settle_trust(
            self.recipe,
            store,
            directory,
            [shard.name for shard in self.val],
            self.leaks,
            lambda text: self.watcher.stage(f"round {number}: {text}"),
        )
        if trust.selection is None:
            evidence = [store.info(shard.name) for shard in shards[len(self.unlabeled) :]]
            count = annotated.samples - annotated.rejects - sum(one.samples - one.rejects for one in evidence)
        else:
            count = trust.selection.facts["selected"]
        self.watcher.stage(
            f"round {number}: training {self.recipe.train.student} on {count} soft labels{_done(directory / 'student')}"
        )
        settings = self.recipe.train.model_copy(update={"seed": self.recipe.train.seed + number - 1})
        warm = self.recipe.rounds.init == "warm" and number > 1
        before = self.out / f"round-{number - 1}" / "student" if warm else None
        result = self._train(settings, directory / "student", trust, before)
        return self._row(number, " + ".join(teacher_uris), settings.student, directory / "student", result), result

    def control(self, steps: int) -> Round:
        """The same student, seed and number of steps, from the labeled set alone."""
        self.watcher.stage(f"control: training the same student on the labels alone{_done(self.out / 'control')}")
        settings = self.recipe.train.model_copy(update={"steps": steps, "epochs": None})
        result = self._train(settings, self.out / "control")
        return self._row(0, "none", settings.student, self.out / "control", result)

    def _train(
        self,
        settings: TrainSettings,
        directory: Location,
        trust: Trust | None = None,
        init_from: Location | None = None,
    ) -> TrainResult:
        """From the labels alone, without a `trust` in soft labels."""
        store = open_store(directory.parent / "store") if trust is not None else None
        result = train(
            settings,
            directory,
            labeled=self.labeled,
            unlabeled=self.unlabeled if trust is not None else (),
            store=store,
            val=self.val,
            selection=trust.selection if trust is not None else None,
            calibration=trust.calibration if trust is not None else None,
            classes=self.classes,
            init_from=init_from,
            device=self.place.device,
            workers=self.place.workers,
            threads=self.place.threads,
            cache=self.place.cache,
            profile=self.place.profile,
            on_progress=self.watcher.training,
            on_note=lambda note: self.watcher.stage(f"note: {note}"),
            trackers=grouped(self.place.trackers, name=self._name(directory), group=self.out.name or "run"),
        )
        if self.place.profile and result.profile is not None:
            self.watcher.stage(f"{summary(result.profile)}\n{advice(result.profile)}")
        return result

    def _name(self, directory: Location) -> str:
        """What a stage is called, such as round-1/student."""
        return os.fspath(directory).removeprefix(os.fspath(self.out)).strip("/")

    def _row(self, number: int, teacher: str, student: str, directory: Location, result: TrainResult) -> Round:
        return Round(
            number,
            teacher,
            student,
            result.parameters,
            result.val_accuracy,
            self.evaluations.accuracy(
                self._name(directory).replace("/", "-"),
                directory,
                self.test,
                trust_code=read_card(directory)[0].student == student,  # the recipe's code, not model.json's
            ),
            result.seconds,
        )


def _done(run: Location) -> str:
    return ": done already" if (run / "run.json").exists() else ""


def _as_teacher(run: Location, student: str) -> str:
    """The spec of a run's student as the next teacher. The recipe named its code, so it may run."""
    trust = (("trust_code", True),) if student.startswith("python:") else ()
    return str(specs.Spec("checkpoint", os.fspath(run), trust))
