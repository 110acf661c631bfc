"""Configurations: what is read, what is refused, and what belongs to the recipe."""

from pathlib import Path

import pytest
import yaml

from cluster.arms import arms
from cluster.config import parse_config, recipe_of
from cluster.errors import BadInputError
from cluster.recipes import load_config, load_recipe

MINIMAL = {
    "run": {"folder": "runs/x"},
    "task": {"name": "gsm8k"},
    "teacher": {"model": "org/teacher"},
    "student": {"model": "org/student"},
}
# What may not change within a run, by section; lora, endpoint and examples where they are given.
RECIPE_FIELDS = {
    "": "base_student further_teachers",
    "run.": "seed",
    "task.": "name data train_prompts validation_prompts test_prompts largest_operand verdict",
    "teacher.": "model chat_template dtype stop trust_remote_code traces_per_prompt",
    "teacher.endpoint.": "url",
    "teacher.few_shot[0].": "question answer",
    "student.": "model chat_template dtype stop trust_remote_code",
    "sampling.": "samples temperature top_p max_new_tokens max_rouge_l",
    "pairs.": "phi phi_schedule negatives negatives_from base draw positives_per_prompt",
    "training.": "method odds_ratio_weight odds_gradient_cap reference_weight teacher_weight "
    "desirable_weight undesirable_weight kl_weight kl_direction nll_scope nll_reduction epochs "
    "steps_per_epoch learning_rate warmup_share final_rate_share betas weight_decay gradient_clip "
    "global_batch max_length precision",
    "training.lora.": "rank alpha dropout",
    "evaluation.": "max_new_tokens",
}
RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(path):
    load_recipe(path)


def test_a_template_is_read_once_and_its_text_kept(config_file, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    for given in (template, "{{ messages }}"):
        config = load_config(config_file, [f"student.chat_template='{given}'"])
        assert config.student.chat_template == "{{ messages }}"
    with pytest.raises(
        BadInputError,
        match=r"student\.chat_template='no\.jinja' is neither a Jinja text nor a file that exists",
    ):
        load_config(config_file, ["student.chat_template=no.jinja"])


def test_there_are_shipped_recipes():
    assert RECIPES


def test_the_papers_values_are_the_defaults(config_file):
    config = load_config(config_file)
    assert (config.sampling.samples, config.sampling.temperature) == (8, 0.8)
    assert (config.sampling.max_rouge_l, config.training.odds_ratio_weight) == (0.8, 1.0)
    assert (config.training.epochs, config.training.global_batch) == (5, 32)
    assert config.training.nll_scope == "response"
    assert config.pairs.negatives == "wrong"


@pytest.mark.parametrize("arm", arms())
def test_every_arm_is_valid_over_every_recipe(arm):
    for path in RECIPES:
        load_recipe(path, arm=arm)


def test_an_arm_is_its_options_and_yields_to_overrides(config_file):
    config = load_config(config_file, ["pairs.phi=0.25"], "single_cot_sft")
    assert (config.training.method, config.pairs.positives_per_prompt) == ("sft", 1)
    assert config.pairs.phi == 0.25


def test_an_unknown_arm_is_refused_with_those_there_are(config_file):
    with pytest.raises(BadInputError, match=r"'best' is not known: .*mixed_policy_orpo"):
        load_config(config_file, arm="best")


def test_a_schedule_of_phi_is_one_for_each_epoch(config_file):
    config = load_config(config_file, ["training.epochs=3", "pairs.phi_schedule=[0,0.5,1]"])
    assert [config.pairs.phi_in(epoch) for epoch in (1, 2, 3)] == [0, 0.5, 1]
    assert load_config(config_file).pairs.phi_in(4) == 0.5


def test_a_mistake_in_an_option_is_not_blamed_on_the_file_alone(config_file):
    with pytest.raises(BadInputError, match=r"recipe\.yaml with pairs\.phi: pairs\.phi=2"):
        load_config(config_file, ["pairs.phi=2"])


def test_overrides_are_read_as_yaml(config_file):
    config = load_config(config_file, ["training.learning_rate=2e-5", "pairs.phi=1", "run.seed=3"])
    assert (config.training.learning_rate, config.pairs.phi, config.run.seed) == (2e-5, 1.0, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=2", "training.epoch is not an option: options here are method"),
        ("trainer.epochs=2", "trainer is not an option"),
        ("training.epochs=two", "training.epochs='two'"),
        ("training.epochs=-1", "greater than or equal to 0"),
        ("pairs.phi_schedule=[0,1]", "has 2 values for training.epochs=5"),
        ("pairs.negatives_from=teacher", "whose negatives never change"),
        ("pairs.phi=1.5", "less than or equal to 1"),
        ("pairs.negatives=bad", "'wrong' or 'wrong_or_unparsed'"),
        ("training.epochs", "is not of the form section.key=value"),
        ("epochs=2", "is not of the form section.key=value"),
        ("run.folder.x=2", "folder is not a section"),
        ("training.epochs=[1", "no YAML value"),
        ("training.micro_batch=5", "not a multiple of micro_batch x workers"),
        ("engines.min_engines=3", "more than max_engines"),
        ("sampling.max_new_tokens=4096", "leaves no room for a prompt"),
        ("evaluation.max_new_tokens=4096", "leaves no room for a prompt in serving"),
        ("training.offload=parameters", "needs zero_stage 3"),
        ("training.offload=optimizer", "needs zero_stage 1 to 3"),
        ("sampling.temperature=0", "8 greedy samples .*set sampling.samples to 1"),
        ("sampling.temperature=-1", "greater than or equal to 0"),
        ("task.verdict={by: oracle}", "'oracle' .*'function', 'unit_tests', 'judge'"),
        ("task.verdict={}", "task.verdict.by is missing: set it"),
        ("task.verdict={by: judge, model: m}", "task.verdict.judge.url is missing"),
        ("task.verdict={by: unit_tests, time: 3}", "unit_tests.time is not an option"),
        ("task.verdict={by: unit_tests, time_limit_s: 0}", "greater than 0"),
    ],
)
def test_bad_values_are_refused_by_name(config_file, override, message):
    with pytest.raises(BadInputError, match="(?s)" + message.replace("(", r"\(")):
        load_config(config_file, [override])


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["training.method=dadpo"], True),
        (["training.method=dadpo", "training.teacher_weight=0"], False),
        (["training.method=sft", "training.kl_weight=0.1"], True),
        (["training.method=kto"], False),
    ],
)
def test_a_teacher_behind_an_endpoint_has_no_probabilities(config_file, options, refused):
    options = [*options, "teacher.endpoint.url=http://localhost:1/v1"]
    if refused:
        with pytest.raises(BadInputError, match="gives texts alone"):
            load_config(config_file, options)
    else:
        load_config(config_file, options)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("url=https://me:sk-1@example.com/v1", "without user, password"),
        ("api_key_env=sk-1", "must be the NAME of an environment variable"),
    ],
)
def test_a_judges_key_has_no_place_in_the_configuration(config_file, option, message):
    judge = "task.verdict={by: judge, url: 'https://example.com/v1', model: big}"
    load_config(config_file, ["task.name=chat", judge])
    with pytest.raises(BadInputError, match=message) as refused:
        load_config(config_file, ["task.name=chat", judge, f"task.verdict.{option}"])
    assert "sk-1" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["engines.between_epochs=release"], "no engine beside the training workers"),
        (["pairs.phi=0", "pairs.negatives_from=teacher"], "where it writes none"),
        (["sampling.temperature=0", "sampling.samples=1"], "the same texts again"),
    ],
)
def test_fresh_negatives_need_somebody_who_writes_them(config_file, options, message):
    load_config(config_file, ["pairs.base=fresh"])
    with pytest.raises(BadInputError, match=f"{message}.*: set pairs.base to once"):
        load_config(config_file, ["pairs.base=fresh", *options])


def test_recent_negatives_need_later_students(config_file):
    load_config(config_file, ["pairs.draw=recent"])
    for mistake in ("pairs.phi=0", "training.epochs=1"):
        with pytest.raises(BadInputError, match=r"pairs\.draw=recent takes .*draw to uniform"):
            load_config(config_file, ["pairs.draw=recent", mistake])


def test_a_missing_section_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: MINIMAL[key] for key in ("run", "task", "teacher")}))
    with pytest.raises(BadInputError, match="student is missing"):
        load_config(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: [1", "not valid YAML"), (b"- 1", "holds list"), (b"\xff\xfe\xfa", "not valid YAML")],
)
def test_broken_files_are_refused(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=message):
        load_config(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="no configuration at"):
        load_config(tmp_path / "none.yaml")


def test_recipe_fields_are_told_from_execution_fields(config_file):
    given = [
        "training.lora={}",
        "teacher.endpoint={url: 'http://x/v1'}",
        "teacher.few_shot=[{question: q, answer: a}]",
    ]
    recipe = recipe_of(load_config(config_file, given))
    expected = {f"{part}{name}" for part, names in RECIPE_FIELDS.items() for name in names.split()}
    assert recipe.keys() == expected
    assert {"teacher.few_shot", "teacher.endpoint", "training.lora"} <= recipe_of(
        load_config(config_file)
    ).keys()


def test_one_greedy_sample_a_prompt_is_allowed(config_file):
    config = load_config(config_file, ["sampling.temperature=0", "sampling.samples=1"])
    assert config.sampling.temperature == 0


def test_what_makes_an_answer_right_is_part_of_the_recipe(config_file):
    assert recipe_of(load_config(config_file))["task.verdict"] is None
    verdict = "{by: judge, url: http://x/v1, model: m, concurrency: 2}"
    recipe = recipe_of(load_config(config_file, [f"task.verdict={verdict}"]))
    assert (recipe["task.verdict.by"], recipe["task.verdict.model"]) == ("judge", "m")
    assert not {"task.verdict.url", "task.verdict.concurrency"} & set(recipe)


@pytest.mark.parametrize(
    ("verdict", "names"),
    [
        ("{by: function, function: 'a.py:f'}", "by function"),
        ("{by: unit_tests}", "by time_limit_s memory_limit_mib"),
        ("{by: judge, url: 'http://x/v1', model: m}", "by model template max_new_tokens"),
    ],
)
def test_what_a_verdict_goes_by_is_part_of_the_recipe(config_file, verdict, names):
    recipe = recipe_of(load_config(config_file, [f"task.verdict={verdict}"]))
    found = {name for name in recipe if name.startswith("task.verdict")}
    assert found == {f"task.verdict.{name}" for name in names.split()}


def test_lora_is_part_of_the_recipe(config_file):
    recipe = recipe_of(load_config(config_file, ["training.lora={rank: 4}"]))
    assert recipe["training.lora.rank"] == 4


def test_a_key_that_is_there_twice_is_refused(config_file):
    config_file.write_text(config_file.read_text() + "\nrun:\n  folder: elsewhere\n")
    with pytest.raises(BadInputError, match=r"'run' is there twice.*line \d+"):
        load_config(config_file)


def test_options_that_are_given_as_they_are_by_default_change_nothing():
    found = parse_config(MINIMAL, "test")
    again = parse_config(found.model_dump(mode="json"), "test")
    assert repr(again) == repr(found)
