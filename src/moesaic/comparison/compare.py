"""A comparison from its arms to its verdict, in five steps; what is decided on the way is kept in comparison.json."""

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from rich.console import Console

from moesaic.comparison.arms import Arm, custom_paths
from moesaic.comparison.budget import Plan, Workload, choose_plan
from moesaic.comparison.costs import measure_costs
from moesaic.comparison.decided import REPLACED, Decided
from moesaic.comparison.fairness import make_fair
from moesaic.comparison.request import (
    OF_BATCHES,
    STEPS,
    Request,
    Subject,
    own_differences,
    read_arms,
    unequal_training,
)
from moesaic.comparison.verdict import RANDOM, UNCHECKED, costs_table, next_steps, sentence
from moesaic.config import from_mapping
from moesaic.data import Data, DataConfig
from moesaic.files import lock, make_folder
from moesaic.imports import names_in, trusting
from moesaic.models import DecoderConfig
from moesaic.models.custom import require_fresh
from moesaic.models.leaks import SEES_LATER, SEES_OTHERS, leaks_of
from moesaic.overrides import apply_overrides
from moesaic.studies.config import StudyConfig, TuneConfig
from moesaic.studies.progress import duration
from moesaic.studies.report import write_study_report, written
from moesaic.studies.results import summarize_study
from moesaic.studies.runner import read_rows, run_study
from moesaic.studies.slots import InThisProcess
from moesaic.testing import check_decoder_parts

__all__ = ["compare"]

SCORE_WINDOWS = 64

CHECKS_DURING_A_RUN = 6

TUNE_SEED = 100

REPETITIONS = 4
"""Passes over the training text that are worth a word: more of them teach little (Muennighoff et al., 2023)."""


def compare(request: Request, console: Console, command: str) -> dict[str, Any]:
    """Run a comparison, or go on with it; returns what summary.json and comparison.json hold.

    Args:
        command: the line that goes on, for people.

    Raises:
        InputError: what cannot be compared, or a directory of another comparison.
    """
    say = _Teller(console)
    with trusting(names_in([arm.config for arm in request.arms])):
        say.say(_what_is_read(request))
        subjects, data = read_arms(request)
        make_folder(request.directory, "results_dir")
        with lock(request.directory, f"{request.directory}: another process is running this comparison"):
            models = {name: subject.candidate.model for name, subject in subjects.items()}
            for model in models.values():
                require_fresh(model)
            decided = Decided(request, models)
            for name, rows in decided.renewed.items():
                say.say(f"{name}: its code has changed: it is checked and run again, {rows} rows are in {REPLACED}")
            _check(request, subjects, decided, say)
            _make_fair(request, subjects, decided, say)
            if request.only == "costs":
                return decided.stored
            plan = _plan(request, subjects, data, decided, say)
        return _run(request, decided, plan, say, command)


def _what_is_read(request: Request) -> str:
    data = request.baseline.config["data"]
    text = f"{data['source']} {data['path'] or ''}".strip()
    return f"{', '.join(arm.name for arm in request.arms)}: reading {text}; all is kept in {request.directory}"


class _Teller:
    """The console, with a heading for each step."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def step(self, title: str, why: str) -> None:
        self.console.print(f"\n[bold]{title}[/] {why}", highlight=False, soft_wrap=True)

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(f"  {text}", markup=False, highlight=False, soft_wrap=True, style=style)


def _check(request: Request, subjects: Mapping[str, Subject], decided: Decided, say: _Teller) -> None:
    """Step 1."""
    parts = {name: custom_paths(subject.candidate.model) for name, subject in subjects.items()}
    stated = {name: _stated_leaks(subject.candidate.model) for name, subject in subjects.items()}
    if not any(parts.values()) and not any(stated.values()):
        say.step("1. Is it valid?", "All parts are ours, and our tests hold them.")
        return
    say.step("1. Is it valid?", "A part that sees the future, or other sequences, has a score that means nothing.")
    for name, subject in subjects.items():
        if not parts[name] and not stated[name]:
            continue
        rows = decided.get(
            "checks",
            name,
            lambda asked=subject.candidate, own=stated[name]: [  # type: ignore[misc]
                *own,
                *(
                    {"check": row.check, "status": row.status, "detail": row.detail, "raised": row.raised}
                    for row in check_decoder_parts(asked.model, asked.seq_len)
                ),
            ],
        )
        failed = [row for row in rows if row["status"] == "fail"]
        passed = [row["check"] for row in rows if row["status"] == "pass"]
        if parts[name]:
            say.say(f"{name} ({', '.join(parts[name])}): {len(passed)} of {len(passed) + len(failed)} checks pass")
        for row in failed:
            say.say(f"FAILS {row['check']}: {row['detail']}", "bold red")


def _stated_leaks(model: DecoderConfig) -> list[dict[str, Any]]:
    """What the class of a built-in router says it fails, as rows of checks."""
    name = None if model.moe is None else model.moe.built_in_router
    leaks = leaks_of(model)
    if name is None or leaks.is_control or not any(layer.ffn == "moe" for layer in model.layers):
        return []  # a control looks at no token
    failed = ["causality"] if leaks.causal is False else []
    failed += ["batch independence"] if leaks.depends_on_batch else []
    detail = f"router {name}: its class says so"
    return [{"check": check, "status": "fail", "detail": detail, "raised": False} for check in failed]


LEAKS = {"causality": SEES_LATER, "batch independence": SEES_OTHERS, "repeatability": RANDOM}
"""Checks whose failure makes a score meaningless, the worst first, and the mark that follows it."""


def _failed_checks(decided: Decided) -> dict[str, list[str]]:
    checks = decided.stored["checks"].items()
    return {name: [row["check"] for row in rows if row["status"] == "fail"] for name, rows in checks}


def _marks(decided: Decided) -> dict[str, str]:
    marks = {}
    for name, rows in decided.stored["checks"].items():
        leaks = {row["check"]: row for row in rows if row["status"] == "fail" and row["check"] in LEAKS}
        seen = [check for check in LEAKS if check in leaks and not leaks[check].get("raised")]
        if leaks:
            marks[name] = LEAKS[seen[0]] if seen else UNCHECKED
    return marks


def _make_fair(request: Request, subjects: Mapping[str, Subject], decided: Decided, say: _Teller) -> None:
    """Steps 2 and 3."""
    say.step("2. What does it cost?", "A training step is counted by torch, and steps of all arms are timed in turn.")
    baseline = subjects[request.baseline.name].candidate
    costs = functools.cache(lambda: measure_costs(baseline))  # the same beside every arm
    fairs: dict[str, Any] = {}
    for arm in request.new:

        def solve(arm: Arm = arm) -> dict[str, Any]:
            with _one_thread():
                fair = make_fair(
                    baseline,
                    subjects[arm.name].candidate,
                    request.equal,
                    given=arm.given,
                    rounds=request.rounds,
                    costs=costs(),
                )
            unequal = (*unequal_training(request, arm), *fair.unequal)
            return dataclasses.asdict(dataclasses.replace(fair, unequal=unequal))

        fair = decided.get("fair", arm.name, solve)
        if request.rounds and fair["after"]["step_seconds"] is None:  # it was asked for costs alone, with rounds=0
            decided.forget("fair", arm.name)
            fair = decided.get("fair", arm.name, solve)
        fairs[arm.name] = fair
    say.console.print(costs_table(request.baseline.name, fairs))
    for name, fair in fairs.items():
        for note in fair["notes"]:
            say.say(f"{name}: {note}")
    say.step("3. Make it fair:", f"equal={request.equal}.")
    for name, fair in fairs.items():
        say.say(f"{name}: {fair['reason']}")
        if fair["unequal"]:
            say.say(f"{name}: not equal: {', '.join(fair['unequal'])}")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """As the workers of a study run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _plan(
    request: Request, subjects: Mapping[str, Subject], data: Data, decided: Decided, say: _Teller
) -> dict[str, Any]:
    """Step 4 before its runs: how long they are."""
    say.step("4. Run:", "seeds are paired by the order of the data.")

    def decide() -> dict[str, Any]:
        tuned = request.rates
        if keys := _compared_rates(request):
            say.say(f"{', '.join(keys)}: is what is compared, so no learning rate is tuned")
            tuned = (1.0,)
        plan = choose_plan(
            _workloads(request, subjects, data, decided),
            budget=request.budget,
            num_seeds=len(request.seeds),
            workers=_workers(request),
            steps=subjects[request.baseline.name].run.training.steps if STEPS in request.fixed else None,
            rates=tuned,
        )
        return {**dataclasses.asdict(plan), "rates": list(plan.rates), "overrides": _lengths(request, plan)}

    plan: dict[str, Any] = decided.get("plan", "runs", decide)
    rates = plan["rates"]
    tuning = f"{len(rates)} learning rates on seed {_tune_seed(request)}, then " if len(rates) > 1 else ""
    if tuning:
        say.say("every arm gets its own learning rate")
    elif (how := _how_to_tune(request, plan)) is not None:
        say.say(f"learning rates are not tuned, and the best one may differ from arm to arm; {how} tunes them")
    tokens = plan["steps"] * subjects[request.baseline.name].run.training.tokens_per_step
    say.say(
        f"{len(request.arms)} arms, each with {tuning}{len(request.seeds)} seeds; {plan['steps']:,} steps, "
        f"{tokens:,} tokens in every run"
    )
    if data.task is None and tokens > REPETITIONS * len(data.train.tokens):
        times = tokens / len(data.train.tokens)
        say.say(f"the training split has {len(data.train.tokens):,} tokens: each is seen about {times:,.0f} times")
    more = "" if plan["at_most"] <= plan["seconds"] else f", {duration(plan['at_most'])} if rates at the edge are best"
    workers = _workers(request)
    at_a_time = "one run" if workers == 1 else f"{workers} runs"
    say.say(f"about {duration(plan['seconds'])} with {at_a_time} at a time{more}")
    return plan


def _workers(request: Request) -> int:
    """Runs at a time: one where parts exist in this process only."""
    return 1 if request.in_process else request.workers


def _rate_keys(request: Request) -> list[str]:
    muon = any(arm.config["optimizer"]["name"] == "muon" for arm in request.arms)
    return ["optimizer.learning_rate", *(["optimizer.muon_learning_rate"] if muon else [])]


def _compared_rates(request: Request) -> list[str]:
    """The learning rates that the arms differ in, which tuning would level."""
    return [key for key in _rate_keys(request) if any(key in arm.given for arm in request.new)]


def _how_to_tune(request: Request, plan: Mapping[str, Any]) -> str | None:
    """What to give for tuned learning rates; None where they are, or cannot be."""
    if len(plan["rates"]) > 1 or _compared_rates(request):
        return None
    return "a longer budget" if request.rates is None else "rates=[0.5,1,2]"


def _tune_seed(request: Request) -> int:
    return TUNE_SEED if TUNE_SEED not in request.seeds else max(request.seeds) + 1


def _workloads(request: Request, subjects: Mapping[str, Subject], data: Data, decided: Decided) -> dict[str, Workload]:
    """What the runs of each arm take, by the steps that were timed beside the baseline's."""
    fairs = decided.stored["fair"]
    baseline = statistics.median(fair["baseline"]["step_seconds"] for fair in fairs.values())
    ratios = {name: fair["after"]["step_seconds"] / fair["baseline"]["step_seconds"] for name, fair in fairs.items()}
    found = {}
    for name, subject in subjects.items():
        training = subject.run.training
        step = subject.run.training.tokens_per_step
        seq_len = training.validation_seq_len or training.seq_len
        whole = len(data.validation.tokens) if data.task is None else data.task.test_size(seq_len) * seq_len
        check = min(whole, (training.validation_batches or whole) * training.batch_size * training.seq_len)
        score = min(whole, (training.score_windows or SCORE_WINDOWS) * seq_len)
        # a forward pass is a third of a step
        found[name] = Workload(
            step_seconds=baseline * ratios.get(name, 1.0) * training.accumulate,
            score_steps=score / step / 3,
            check_steps=CHECKS_DURING_A_RUN * check / step / 3,
        )
    return found


def _lengths(request: Request, plan: Plan) -> dict[str, Any]:
    """Keys of all runs that follow from their number of steps, but for those that the person set."""
    steps = plan.steps
    wanted = {
        STEPS: steps,
        "training.validate_every": max(1, steps // CHECKS_DURING_A_RUN),
        "training.checkpoint_every": max(1, steps // 4),
        "training.score_windows": SCORE_WINDOWS,
        "schedule.warmup_steps": min(request.baseline.config["schedule"]["warmup_steps"], max(1, steps // 10)),
        "finish": "score",
    }
    return {key: value for key, value in wanted.items() if key not in request.fixed}


def _run(request: Request, decided: Decided, plan: Mapping[str, Any], say: _Teller, command: str) -> dict[str, Any]:
    """Step 4, and step 5."""
    fair = decided.stored["fair"]
    base = apply_overrides(request.baseline.config, {**plan["overrides"], "name": request.directory.name}, "budget")
    arms = {request.baseline.name: {}} | {
        arm.name: {**own_differences(request, arm), **fair[arm.name]["overrides"]} for arm in request.new
    }
    tuned = len(plan["rates"]) > 1
    task = from_mapping(DataConfig, base["data"], "data").make_task() is not None
    study = StudyConfig(
        question=f"Is {' or '.join(arm.name for arm in request.new)} better than {request.baseline.name}?",
        equal=_equal(
            fair, same_batches=not any(own_differences(request, arm).keys() & {*OF_BATCHES} for arm in request.new)
        ),
        baseline=request.baseline.name,
        arms=arms,
        seeds=request.seeds,
        metric="recall/accuracy" if task else "validation/bits_per_byte",
        higher_is_better=task,
        tune=TuneConfig(_tune_seed(request), tuple(plan["rates"]), tuple(_rate_keys(request))) if tuned else None,
        marks=_marks(decided),
    )
    results = request.directory
    try:
        failed = run_study(
            study,
            base,
            results=results,
            runs=results / "runs",
            workers=_workers(request),
            console=say.console,
            estimate=plan["seconds"],
            make_worker=InThisProcess if request.in_process else None,
        )
    except KeyboardInterrupt:
        say.console.print("interrupted; finished runs are kept, the others continue with")
        say.console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)
        raise
    rows = read_rows(results, study, base)
    say.step("5. Verdict", "")
    found = summarize_study(study, rows)
    [against, *new] = found
    sentences = [sentence(study, arm, fair[arm.arm]["unequal"], against) for arm in new]
    then = next_steps(study, found, _failed_checks(decided), _how_to_tune(request, plan))
    if rows:
        write_study_report(study, base, rows, results, command, say.console, sentences, then)
    for run, reason in failed.items():
        say.say(f"failed: {run}: {reason}")
    say.say(written(results, "comparison.json"))
    return {**decided.stored, "verdict": sentences, "next": then, "failed": failed, "rows": list(rows.values())}


def _equal(fair: Mapping[str, Any], same_batches: bool) -> str:
    unequal = [f"{name}: {', '.join(each['unequal'])}" for name, each in fair.items() if each["unequal"]]
    text = f"text, {'order of the data, tokens, ' if same_batches else ''}and what the arms share"
    return f"{text}. Not equal: {'; '.join(unequal)}" if unequal else text
