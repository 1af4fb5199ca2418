"""A checkpoint that is not whole, or not safe, is refused; nothing of it is filled with random numbers or run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
from checkpoints import edit_json, mixed_texts, write_json

import fanfold as ff
from fanfold.cli.main import run as command
from fanfold.errors import FanfoldError, InputError, SafetyError

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("torch") is None, reason="needs the extra 'torch'"),
]


def change_weights(folder, change, file="model.safetensors"):
    from safetensors.torch import load_file, save_file

    weights = change(load_file(folder / file))
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / file, metadata={"format": "pt"})


def embedded(folder, on="inline", **options):
    return ff.embed(["a text", "another"], model=str(folder), on=on, **options)


# -- weights that are missing -------------------------------------------------------------------------

LACKING = {
    "bert": "encoder.layer.1.attention.self.query.weight",
    "roberta": "encoder.layer.0.output.dense.bias",
    "distilbert": "transformer.layer.0.ffn.lin1.weight",
    "modernbert": "final_norm.weight",
    "mpnet": "encoder.relative_attention_bias.weight",
    "electra": "embeddings_project.weight",
    "albert": "embeddings.position_embeddings.weight",
    "t5": "encoder.block.0.layer.0.layer_norm.weight",
    "qwen3": "norm.weight",
}


@pytest.mark.parametrize("family", LACKING)
def test_a_weight_that_is_missing_is_named(family, checkpoint):
    folder = checkpoint(family, head={})
    name = LACKING[family]

    def without(weights):
        assert name in weights, sorted(weights)
        return {key: value for key, value in weights.items() if key != name}

    change_weights(folder, without)
    with pytest.raises(InputError) as caught:
        embedded(folder)
    assert name in str(caught.value)
    assert "missing" in str(caught.value)


def test_a_weight_that_is_missing_is_named_by_workers_too(checkpoint, tmp_path, capfd):
    folder = checkpoint("bert", head={})
    change_weights(folder, lambda weights: {key: value for key, value in weights.items() if key != LACKING["bert"]})
    (tmp_path / "docs.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    out = tmp_path / "a.parquet"
    code = command(["embed", str(tmp_path / "docs.jsonl"), "-o", str(out), "--model", str(folder), "--on", "cpu:2"])
    told = capfd.readouterr().err
    assert code == InputError.exit_code, told
    assert LACKING["bert"] in told
    assert "Traceback" not in told
    assert not out.exists()


def test_a_weight_of_another_shape_is_refused(checkpoint):
    folder = checkpoint("bert", head={})
    name = LACKING["bert"]
    change_weights(folder, lambda weights: {**weights, name: weights[name][:-1]})
    with pytest.raises(InputError) as caught:
        embedded(folder)
    assert name in str(caught.value)


def test_a_pooler_that_is_missing_is_not_needed(checkpoint):
    folder = checkpoint("bert", head={})
    whole = embedded(folder)
    change_weights(
        folder, lambda weights: {key: value for key, value in weights.items() if not key.startswith("pooler.")}
    )
    assert embedded(folder).tobytes() == whole.tobytes()


def test_a_checkpoint_of_another_family_is_refused(checkpoint, tmp_path):
    """Its names fit nowhere: every weight would be random."""
    folder = checkpoint("bert", head={})
    other = checkpoint("distilbert", name="other")
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="missing"):
        embedded(folder)


@pytest.mark.parametrize("width", [24, 48])
def test_a_projection_without_weights_is_refused(width, checkpoint):
    """48 is the width without it, too: left away, nobody would see that the numbers are others."""
    folder = checkpoint("bert", head={"dense": width})
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(FanfoldError) as caught:
        embedded(folder)
    assert "2_Dense" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_projection_that_lacks_its_bias_is_refused(checkpoint):
    folder = checkpoint("bert", head={"dense": 24})
    change_weights(folder, lambda weights: {"linear.weight": weights["linear.weight"]}, "2_Dense/model.safetensors")
    with pytest.raises(FanfoldError) as caught:
        embedded(folder)
    assert "2_Dense" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_load_that_failed_fails_again(checkpoint):
    """Half a model must not pass for a whole one: the projection would be left away without a word."""
    from fanfold.plan.numerics import Numerics
    from fanfold.plan.plan import Unit
    from fanfold.tasks.embed import make_embed
    from fanfold.tasks.task import ModelBatch

    folder = checkpoint("bert", head={"dense": 48})
    change_weights(folder, lambda weights: {"linear.weight": weights["linear.weight"]}, "2_Dense/model.safetensors")
    opened = make_embed(model=str(folder)).open(Unit(name="inline"), Numerics())
    ids = opened.prepare(["a text"]).ids
    for call in (opened.load, opened.load, lambda: opened.compute(ModelBatch(ids=ids, length=len(ids[0])))):
        with pytest.raises((FanfoldError, RuntimeError)):
            call()


def test_a_projection_that_is_cut_off_is_refused(checkpoint):
    folder = checkpoint("bert", head={"dense": 24})
    path = folder / "2_Dense" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(SafetyError, match="truncated or damaged"):
        embedded(folder)


def test_a_file_that_is_cut_off_is_refused(checkpoint):
    folder = checkpoint("bert", head={})
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SafetyError, match="truncated or damaged"):
        embedded(folder)


def test_a_part_of_the_weights_that_is_missing_is_refused(checkpoint):
    """Weights in several files, of which the index names one that is not there."""
    from safetensors.torch import load_file, save_file

    folder = checkpoint("bert", head={})
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {name: f"model-0000{1 + (i > len(names) // 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    assert embedded(folder).shape == (2, 48)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FanfoldError) as caught:
        embedded(folder)
    assert caught.value.exit_code in (2, 6)
    assert "model-00002-of-00002.safetensors" in str(caught.value)


# -- pickled weights ----------------------------------------------------------------------------------


class Marks:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt", "tf_model.h5"])
def test_pickled_weights_are_refused_before_anything_heavy_is_imported(name, checkpoint, tmp_path):
    import pickle

    folder = checkpoint("bert", head={})
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Marks(tmp_path / "marked")))
    (tmp_path / "docs.jsonl").write_text('{"text": "a"}\n')
    program = (
        "import sys, time; start = time.monotonic(); from fanfold.cli.main import run; "
        "code = run(sys.argv[1:]); "
        "print(code, time.monotonic() - start, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    arguments = ["embed", str(tmp_path / "docs.jsonl"), "-o", str(tmp_path / "out"), "--model", str(folder)]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    code, elapsed_s, *heavy = done.stdout.split()
    assert (code, heavy) == ("6", ["False", "False"]), done.stderr
    assert float(elapsed_s) < 1.5  # 1 s where the machine is not shared with others
    assert name in done.stderr
    assert "convert it" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "marked").exists()
    assert not (tmp_path / "out").exists()


def test_a_pickle_beside_safetensors_is_not_read(checkpoint, tmp_path):
    import pickle

    folder = checkpoint("bert", head={})
    whole = embedded(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Marks(tmp_path / "marked")))
    assert embedded(folder).tobytes() == whole.tobytes()
    assert not (tmp_path / "marked").exists()


def test_a_projection_with_pickled_weights_is_refused(checkpoint, tmp_path):
    import pickle

    folder = checkpoint("bert", head={"dense": 24})
    (folder / "2_Dense" / "model.safetensors").unlink()
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(pickle.dumps(Marks(tmp_path / "marked")))
    with pytest.raises(SafetyError, match="pickled"):
        embedded(folder)
    assert not (tmp_path / "marked").exists()


# -- code that comes with the model -------------------------------------------------------------------

REMOTE = """
import os
os.mkdir({marker!r})
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

class OwnConfig(BertConfig):
    model_type = "own_model"

class OwnModel(BertModel):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass

class OwnModule:
    pass
"""


def with_code(folder, tmp_path):
    marker = tmp_path / "the-code-was-run"
    (folder / "own.py").write_text(REMOTE.format(marker=str(marker)))
    return marker


@pytest.mark.parametrize("on", ["inline", "cpu:2"])
def test_a_model_that_needs_its_own_code_is_refused(on, checkpoint, tmp_path, capfd):
    folder = checkpoint("bert", head={})
    marker = with_code(folder, tmp_path)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    edit_json(folder / "config.json", model_type="own_model", auto_map=classes)
    (tmp_path / "docs.jsonl").write_text('{"text": "a"}\n')
    out = tmp_path / "a.parquet"
    start_s = time.monotonic()
    arguments = ["embed", str(tmp_path / "docs.jsonl"), "-o", str(out), "--model", str(folder), "--on", on]
    code = command(arguments)
    elapsed_s = time.monotonic() - start_s
    told = capfd.readouterr().err
    assert not marker.exists()
    assert code == 6, told
    assert "own.py" in told or "code" in told
    assert "Traceback" not in told
    assert "[y/N]" not in told, "nobody is asked"
    assert not out.exists()
    assert elapsed_s < 20


def test_a_tokenizer_that_needs_its_own_code_is_refused_or_replaced_but_never_run(checkpoint, tmp_path):
    folder = checkpoint("bert", head={})
    whole = embedded(folder)
    marker = with_code(folder, tmp_path)
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
    )
    try:
        vectors = embedded(folder)
    except SafetyError:
        pass
    else:
        assert vectors.tobytes() == whole.tobytes()
    assert not marker.exists()


def test_code_beside_a_family_that_transformers_knows_is_never_run(checkpoint, tmp_path):
    """As with sentence-transformers: transformers' own class is used, or the model is refused."""
    folder = checkpoint("bert", head={})
    whole = embedded(folder)
    marker = with_code(folder, tmp_path)
    edit_json(folder / "config.json", auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"})
    try:
        vectors = embedded(folder)
    except SafetyError:
        pass
    else:
        assert vectors.tobytes() == whole.tobytes()
    assert not marker.exists()


def test_a_module_of_its_own_is_refused(checkpoint, tmp_path):
    folder = checkpoint("bert", head={})
    marker = with_code(folder, tmp_path)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "own.OwnModule"},
    ]
    write_json(folder / "modules.json", modules)
    with pytest.raises(FanfoldError) as caught:
        embedded(folder)
    assert "OwnModule" in str(caught.value)
    assert caught.value.exit_code in (2, 6)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["Transformer", "Pooling", "Normalize"])
def test_a_module_of_its_own_with_a_usual_name_is_refused(name, checkpoint, tmp_path):
    """The last word of a module's type says nothing: `own.Pooling` is not sentence-transformers' Pooling."""
    folder = checkpoint("bert", head={"normalize": True})
    marker = with_code(folder, tmp_path)
    with (folder / "own.py").open("a") as file:
        file.write(f"\nclass {name}:\n    pass\n")
    path = folder / "modules.json"
    path.write_text(path.read_text().replace(f"sentence_transformers.models.{name}", f"own.{name}"))
    with pytest.raises(FanfoldError) as caught:
        embedded(folder)
    assert f"own.{name}" in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("path", ["../outside", "/etc"])
def test_a_module_outside_the_models_folder_is_refused(path, checkpoint, tmp_path):
    folder = checkpoint("bert", head={})
    write_json(tmp_path / "outside" / "config.json", {"word_embedding_dimension": 48, "pooling_mode_cls_token": True})
    edited = (folder / "modules.json").read_text().replace("1_Pooling", path)
    (folder / "modules.json").write_text(edited)
    with pytest.raises(FanfoldError) as caught:
        embedded(folder)
    assert path in str(caught.value)


def test_the_same_texts_still_pass_with_a_sound_checkpoint(checkpoint):
    """The refusals above do not come from the checkpoints themselves."""
    assert ff.embed(mixed_texts(), model=str(checkpoint("bert", head={"dense": 24})), on="inline").shape == (60, 24)
