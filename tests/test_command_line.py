"""From words to a call: which options were given, and which would change nothing."""

import inspect

import pytest
from commands import diffussm, grid

from diffussm import cli, command_line
from diffussm.distributed import rank, world_size
from diffussm.parsing import told_of

IDLE = [
    ("sample --from {w}/digits --grid {t}/x.png --count 3", "--count"),
    (
        "sample --from {w}/digits --grid {t}/x.png --labels random --batch_size=3",
        "--labels and --batch_size",
    ),
    ("sample --from {w}/digits --out {t}/x --per_class 3", "--per_class"),
    ("sample --from {w}/digits --out {t}/x --overwrite", "--overwrite"),
    ("sample --from {w}/digits --gif {t}/x.gif --count 3", "--count"),
    ("sample --from {w}/digits --out {t}/x --seeds 1,2", "--seeds"),
    ("sample --from {w}/digits --out {t}/x --interpolate 1,2", "--interpolate"),
    ("sample --from {w}/digits --out {t}/x --scheduler DDIM", "--scheduler"),
    (
        "sample --from {w}/digits --grid {t}/x.png --seeds 1 --seed 2 --per_class 3",
        "--seed and --per_class",
    ),
    ("sample --from {w}/digits --grid {t}/x.png --interpolate 1,2 --seed 2", "--seed"),
    (
        "sample --from {w}/digits --grid {t}/x.png --scheduler DDIM --method ddim",
        "--method",
    ),
    (
        "sample --from {w}/digits --out {t}/x --cfg_scale 1 --guidance_channels 1",
        "--guidance_channels",
    ),
    (
        "sample --from {w}/digits --grid {t}/x.png --guidance_channels 3",
        "--guidance_channels=3",
    ),
    ("sample --from {p}/run --grid {t}/x.png --classes 1", "--classes"),
    (
        "sample --from {p}/run --out {t}/x --cfg_scale 2 --labels random",
        "--labels and --cfg_scale",
    ),
    ("train digits --out {t}/x --exif_rotate true", "--exif_rotate"),
    ("train digits --out {t}/x --workers 2", "--workers"),
    ("train digits --out {t}/x --vae {w}/vae", "--vae"),
    (
        "train {w}/tiny.yaml --data {w}/latents --out {t}/x --exif_rotate true",
        "--exif_rotate",
    ),
    (
        "train {w}/tiny.yaml --data {w}/latents --out {t}/x --vae {w}/vae --no_grid",
        "--vae",
    ),
    ("train {p}/plain.yaml --data {p}/images --out {t}/x --vae {w}/vae", "--vae"),
    ("doctor digits --vae {w}/vae", "--vae"),
    ("doctor digits --workers 2", "--workers"),
    ("doctor digits --held_out {w}/images", "--held_out"),
    ("evaluate --self_test --size 8 --exif_rotate", "--size and --exif_rotate"),
    ("evaluate --self_test --weights {w}/tiny.yaml", "--weights"),
]


@pytest.mark.parametrize(("command", "names"), IDLE, ids=range(len(IDLE)))
def test_an_option_that_would_change_nothing_is_refused_by_name(
    work, plain, tmp_path, command, names
):
    said = diffussm(command, 1, w=work, p=plain.folder, t=tmp_path)
    assert names in said.splitlines()[-1] and not list(tmp_path.iterdir())


def test_defaults_recipes_and_presets_are_not_taken_for_options_that_were_given(
    work, tmp_path
):
    """paper-fid guides three channels, digits have one; the recipe may name workers."""
    (tmp_path / "recipe.yaml").write_text(
        (work / "tiny.yaml").read_text() + "workers: 2\n"
    )
    diffussm(
        "train {t}/recipe.yaml --data {w}/latents --out {t}/run --no_grid --device cpu",
        w=work,
        t=tmp_path,
    )
    grid(
        work / "digits", tmp_path / "x.png", "--preset paper-fid --steps 2 --classes 1"
    )


def test_a_command_has_one_process_by_default():
    with command_line.start("train", "cpu") as device:
        assert device.type == "cpu" and (rank(), world_size()) == (0, 1)


def test_a_whole_configuration_may_say_what_does_not_matter_here(tmp_path):
    """What a file says that has all options is not typed, and the file is read."""
    seen = []

    def command(recipe, execution, given):
        """what is asked for"""
        seen.append((execution.workers, recipe.steps, given))
        return 0

    file = tmp_path / "all.yaml"
    file.write_text("workers: 2\nsteps: 3000\n")
    for config in (["--config", str(file)], [f"--config={file}"]):
        words = ["digits", *config, "--steps", "5000"]
        assert command_line.call(command, words, command_line.recipe_group) == 0
        assert seen.pop() == (2, 5000, {"config", "steps"})
    words = ["digits", "--workers", "2"]
    command_line.call(command, words, command_line.recipe_group)
    assert "workers" in seen.pop()[2]


def test_every_option_of_a_command_is_in_its_signature_and_has_its_words():

    groups = {"recipe", "execution", "free", "wanted", "given"}
    for command in cli.COMMANDS.values():
        title, description, told = told_of(command)
        parameters = inspect.signature(command).parameters
        assert told.keys() == parameters.keys() - groups and title and description


def test_dashes_are_underscores_in_names_and_stay_in_values():
    seen = []

    def command(*, two_words: str, is_so: bool = False):
        """take two options

        Args:
            two_words: a text
            is_so: a flag
        """
        seen.append((two_words, is_so))
        return 0

    command_line.call(command, ["--two-words", "a-b", "--is-so"])
    command_line.call(command, ["--two_words=a-b"])
    assert seen == [("a-b", True), ("a-b", False)]


def test_old_names_of_options_are_taken_with_a_warning(capsys):
    seen = []

    def command(recipe, execution, given):
        """what is asked for"""
        seen.append((execution, given))
        return 0

    words = "digits --recompute true --parallel=fsdp".split()
    command_line.call(command, words, command_line.recipe_group)
    execution, given = seen.pop()
    assert execution.activation_checkpointing == "all"
    assert execution.strategy == "fsdp"
    assert given == {"activation_checkpointing", "strategy"}
    said = capsys.readouterr().err
    assert "--activation_checkpointing now" in said and "--strategy now" in said
