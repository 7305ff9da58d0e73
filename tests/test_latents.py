"""The latent store: what is kept, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import write_lsun
from stores import OPTIONS, SIZE, content, make_vae

from diffussm.autoencoder import vae_identity
from diffussm.encoding import encode
from diffussm.folders import ImageFolder
from diffussm.formats import images_from
from diffussm.images import BadImage
from diffussm.latents import (
    LatentStore,
    map_shard,
    npy_header,
    read_manifest,
    verify_store,
    with_checksum,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_store_holds_the_posterior_of_every_good_image_and_of_its_mirror_image(
    vae, root, whole
):
    folder = ImageFolder(root, SIZE)
    good = [i for i in range(len(folder)) if "a" not in Path(folder.path(i)).stem]
    store = LatentStore(whole)
    assert len(store) == len(good) == 20
    for place, i in enumerate(good):
        image = folder[i][0][None]
        for flipped in (False, True):
            q = vae.encode(image.flip(-1) if flipped else image).latent_dist
            stored = store.moments(torch.tensor([place]), torch.tensor([flipped]))[
                0
            ].float()
            torch.testing.assert_close(stored[0], q.mean[0], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(stored[1], q.logvar[0], rtol=2e-3, atol=2e-3)
        assert store[place][1] == store.labels[place] == folder.labels[i]
    mirrored = store.moments(torch.tensor([0]), torch.tensor([True])).flip(-1)
    assert not torch.allclose(mirrored, store.moments(torch.tensor([0])))


def test_store_is_a_data_set_that_training_draws_from(whole):
    store = LatentStore(whole)
    assert store.levels is None  # latents: drawn, from noise
    assert (
        store.classes == ("cats", "dogs")
        and store.num_classes == 2
        and store.flip is True
    )
    assert store.shape == (4, 8, 8) and store.scale == 0.5
    image, label = store[3]
    assert (
        image.shape == (4, 8, 8)
        and image.dtype == torch.float32
        and isinstance(label, int)
    )
    assert torch.equal(store[-1][0], store[len(store) - 1][0])
    with pytest.raises(IndexError):
        store[len(store)]
    with pytest.raises(IndexError):
        store.moments(torch.tensor([0, -1]))


def test_draws_have_the_posteriors_mean_and_deviation(whole):
    store = LatentStore(whole)
    draws = 4000
    indices, flips = torch.full((draws,), 7), torch.ones(draws, dtype=torch.bool)
    x0, labels = store.batch(
        indices,
        flips,
        torch.randn(draws, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    mean, log_variance = store.moments(indices[:1], flips[:1])[0].double()
    std = (log_variance / 2).exp()
    error = (x0.double().mean(0) - 0.5 * mean) / (
        0.5 * std / draws**0.5
    )  # (4, 8, 8), standard normal
    assert error.abs().max() < 5 and abs(error.std().item() - 1) < 0.2
    torch.testing.assert_close(x0.double().std(0), 0.5 * std, rtol=0.06, atol=0)
    assert labels.tolist() == [store[7][1]] * draws
    still, _ = store.batch(torch.tensor([7]), None, torch.zeros(1, 4, 8, 8))
    assert torch.equal(still[0], store[7][0])


def test_batch_in_any_order_is_its_images_one_by_one(whole):
    store = LatentStore(whole)
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(1))
    flips = order % 2 == 0
    together = store.moments(order, flips)
    for k, i in enumerate(order):
        assert torch.equal(together[k], store.moments(i[None], flips[k : k + 1])[0])


def test_without_flips_the_store_is_half_as_large_and_flips_are_ignored(
    vae, root, whole, tmp_path
):
    store = encode(
        ImageFolder(root, SIZE), tmp_path / "o", vae, "test", **OPTIONS, flip=False
    )
    assert store.flip is False
    indices = torch.arange(len(store))
    assert torch.equal(
        store.moments(indices, indices < 9), LatentStore(whole).moments(indices)
    )


def test_shards_are_plain_npy_files(whole):
    store = LatentStore(whole)
    first = 0
    for shard in store.manifest["shards"]:
        array = np.load(whole / shard["name"], allow_pickle=False)
        assert (
            array.shape == (shard["images"], 2, 2, 4, 8, 8)
            and array.dtype == np.float16
        )
        assert np.array_equal(
            array[:, 0], store.moments(torch.arange(first, first + len(array))).numpy()
        )
        first += len(array)
    assert first == len(store)


@pytest.mark.parametrize(
    "shape", [(0, 1, 2, 4, 8, 8), (5,), (123456789, 2, 2, 4, 32, 32), (10**18,) * 6]
)
def test_npy_header_is_one_that_numpy_reads(shape, tmp_path):
    (tmp_path / "h").write_bytes(npy_header(shape))
    with (tmp_path / "h").open("rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == (
            shape,
            False,
            np.dtype("<f2"),
        )
        assert file.tell() == len(npy_header(shape)) and file.tell() % 64 == 0


@pytest.mark.parametrize("side", [8, 32, 64, 4096])
def test_npy_header_is_that_of_stores_written_before(side):
    """As the book wrote it by itself, before numpy's own writer was taken."""
    shape = (8192, 2, 2, 4, side, side)
    text = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}"
    before = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    assert npy_header(shape) == before + f"{text:<117}\n".encode()


def test_a_draw_cannot_be_told_from_the_encoders_own(vae, root, whole):
    from scipy.stats import ks_2samp

    draws, store = 2000, LatentStore(whole)
    folder = ImageFolder(root, SIZE)
    x0, _ = store.batch(
        torch.full((draws,), 3),
        None,
        torch.randn(draws, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    posterior = vae.encode(folder[3][0][None]).latent_dist
    generator = torch.Generator().manual_seed(1)
    own, measure = (
        0.5 * torch.cat([posterior.sample(generator) for _ in range(draws)])
        for _ in range(2)
    )

    def p(a, b):
        return ks_2samp(
            *(((z - measure.mean(0)) / measure.std(0)).flatten() for z in (a, b))
        ).pvalue

    assert p(x0, own) > 1e-3
    assert (
        p(own.mean(0) + 1.03 * (x0 - own.mean(0)), own) < 1e-6
    )  # it would notice three per cent


def test_latents_of_another_autoencoder_are_refused(vae, whole):
    store = LatentStore(whole)
    store.check_vae(vae)
    with pytest.raises(ValueError, match="encoder_sha256"):
        store.check_vae(make_vae(1))
    scaled = make_vae()
    scaled.register_to_config(scaling_factor=0.18215)
    with pytest.raises(ValueError, match="scaling_factor"):
        store.check_vae(scaled)


@pytest.mark.parametrize("part", ["encoder.conv_in", "quant_conv"])
def test_the_smallest_change_of_an_encoder_is_another_encoder(vae, whole, part):
    changed = make_vae()
    weight = changed.get_submodule(part).weight
    with torch.no_grad():
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))
    assert (
        vae_identity(changed, "")["decoder_sha256"]
        == vae_identity(vae, "")["decoder_sha256"]
    )
    with pytest.raises(
        ValueError, match="made by the encoder of 'test'.* encoder_sha256"
    ):
        LatentStore(whole).check_vae(changed)


def test_truncated_shard_is_refused(copy):
    shard = copy / "shard-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        LatentStore(copy)
    assert len(verify_store(copy)) == 1


def test_missing_shard_is_refused(copy):
    (copy / "shard-00002.npy").unlink()
    with pytest.raises(FileNotFoundError):
        LatentStore(copy)
    assert len(verify_store(copy)) == 1


@pytest.mark.parametrize("seed", range(20))
def test_flipped_byte_anywhere_is_found(copy, seed):
    rng = random.Random(seed)
    assert verify_store(copy) == []
    file = rng.choice([*sorted(copy.glob("shard-*.npy")), copy / "manifest.json"])
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    assert verify_store(copy) or same_json(
        file, data
    )  # where white space became other white space


def same_json(file: Path, data: bytes) -> bool:
    return file.suffix == ".json" and read_manifest(file.parent) == json.loads(data)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/this-must-never-exist",))


@pytest.mark.parametrize("form", ["pickle", "object array", "npz", "padded"])
def test_pickle_in_place_of_a_shard_is_refused_and_not_run(copy, form, tmp_path):
    shard, foreign = copy / "shard-00000.npy", tmp_path / "foreign.npy"
    size = shard.stat().st_size
    if form in ("object array", "padded"):
        np.save(foreign, np.array([Bomb()], dtype=object), allow_pickle=True)
    elif form == "npz":
        with foreign.open("wb") as file:
            np.savez(file, a=np.array([Bomb()], dtype=object))
    else:
        foreign.write_bytes(pickle.dumps(Bomb()))
    data = foreign.read_bytes()
    shard.write_bytes(data.ljust(size, b"\0")[:size] if form == "padded" else data)
    with pytest.raises(ValueError, match=r"truncated|does not begin"):
        LatentStore(copy)
    assert verify_store(copy) and not Path("/tmp/this-must-never-exist").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../whole/shard-00000.npy",
        "/etc/passwd",
        "shard-00001.npy",
        "shard-0.npy",
        "",
        None,
        7,
    ],
)
def test_path_tricks_are_refused(copy, name):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][0]["name"] = name
    (copy / "manifest.json").write_text(json.dumps(with_checksum(manifest)))
    with pytest.raises(ValueError, match=r"expected a name, 'shard-00000\.npy'"):
        LatentStore(copy)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("shards", 0, "labels"), [[2, 6]]),  # there are two classes
        (("shards", 0, "labels"), [[-1, 6]]),
        (("shards", 0, "labels"), [[0, 5]]),  # and six images
        (("shards", 0, "labels"), [[0, 6], [1, 0]]),
        (("shards", 0, "labels"), [[True, 6]]),
        (("shards", 0, "labels"), [[0, 10**30]]),
        (("shards", 0, "labels"), [0] * 6),
        (("shards", 0, "images"), 6.0),
        (("shards", 0, "images"), -6),
        (("shards", 0, "sha256"), None),
        (("shards", 0), None),
        (("shards",), []),
        (("shards",), {}),
        (("vae", "scaling_factor"), 0),
        (("vae", "scaling_factor"), -0.5),
        (("vae", "scaling_factor"), float("nan")),
        (("vae", "scaling_factor"), 10**400),
        (("vae", "scaling_factor"), "0.5"),
        (("vae", "encoder_sha256"), 7),
        (("vae",), []),
        (("shape",), [4, 8]),
        (("shape",), [4, 8, 0]),
        (("shape",), [4, 8, 2**70]),
        (("shape",), [2, 16, 8.0]),
        (("flip",), 1),
        (("classes",), "cats"),
        (("classes",), [1, 2]),
        (("classes",), []),
        (("format",), "diffussm-latents-3"),
        (("format",), "diffussm-latents-1"),
    ],
)
def test_every_entry_that_matters_is_checked(copy, place, value):
    manifest = json.loads((copy / "manifest.json").read_text())
    target = manifest
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    (copy / "manifest.json").write_text(json.dumps(with_checksum(manifest)))
    with pytest.raises(ValueError, match=r"manifest\.json: "):
        LatentStore(copy)


def test_changed_manifest_is_refused_even_where_it_makes_sense(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["vae"]["scaling_factor"] = 0.25
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="checksum"):
        LatentStore(copy)


def places(value, path=()):
    """The path of every value inside a JSON document."""
    yield path
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in children:
        yield from places(child, (*path, key))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**30, -1]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_fuzzed_manifests_are_refused_or_harmless(copy, whole, data):
    manifest = json.loads((whole / "manifest.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([p for p in places(manifest) if p]))
        target = manifest
        for key in path[:-1]:
            target = target[key]
        if data.draw(st.booleans()):
            target[path[-1]] = data.draw(JSON)
        else:
            del target[path[-1]]
        if not manifest:
            break
    if data.draw(st.booleans()):
        manifest = with_checksum(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    before = content(copy)
    try:
        store = LatentStore(copy)
    except (ValueError, OSError) as error:
        assert str(error)
        assert verify_store(copy)
    else:
        store.batch(
            torch.tensor([0, len(store) - 1]),
            torch.tensor([True, False]),
            torch.zeros(2, *store.shape),
        )
        assert max(store.labels.tolist()) < max(store.num_classes, 1)
    assert content(copy) == before


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.binary(max_size=300)
    | st.text().map(str.encode)
    | st.integers(1, 10**5).map(lambda n: b"[" * n)
)
def test_arbitrary_bytes_are_no_manifest(copy, noise):
    (copy / "manifest.json").write_bytes(noise)
    with pytest.raises((ValueError, OSError)):
        LatentStore(copy)
    assert len(verify_store(copy)) == 1


@pytest.fixture(scope="module")
def lsun(root, tmp_path_factory) -> Path:
    return write_lsun(root, tmp_path_factory.mktemp("lsun") / "church_train_lmdb")


def test_lmdb_is_encoded_without_classes(vae, lsun, tmp_path):
    images = images_from(lsun, SIZE)
    store = encode(images, tmp_path / "o", vae, "t", **OPTIONS)
    assert store.num_classes == 0 and store.labels.tolist() == [0] * 20
    good = [i for i in range(len(images)) if not raises(images, i)]
    q = vae.encode(images[good[4]][0][None]).latent_dist
    torch.testing.assert_close(store[4][0], q.mean[0] * 0.5, rtol=2e-3, atol=2e-3)


def raises(images, i) -> bool:
    try:
        images.read(i)
    except BadImage:
        return True
    return False


def test_map_shard_maps_and_does_not_read(tmp_path):
    shape = (1 << 20, 2, 2, 4, 32, 32)  # 32 GiB, of which nothing is on disk
    with (tmp_path / "s.npy").open("wb") as file:
        file.write(npy_header(shape))
        file.truncate(len(npy_header(shape)) + 2 * int(np.prod(shape)))
    content = map_shard(tmp_path / "s.npy", shape)
    start = len(npy_header(shape))
    shard = np.frombuffer(content, "<f2", offset=start).reshape(shape)
    assert shard[12345, 1].max() == 0 and not shard.flags.writeable


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_system_is_told_that_visits_are_random(whole):
    """Or it would read 128 KiB ahead for each of them."""
    store = LatentStore(whole)
    flags, here = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            here = line.endswith(str(whole / "shard-00000.npy"))
        elif here and line.startswith("VmFlags:"):
            flags.append(line.split()[1:])
    assert len(store) and flags and all("rr" in found for found in flags)


def test_readers_in_several_threads_wait_together_and_read_the_same(whole):
    store, indices = LatentStore(whole), torch.tensor([4, 1, 3, 1, 0, 2])
    flips, meeting = torch.tensor([True, False] * 3), threading.Barrier(3, timeout=60)
    alone, honest = store.moments(indices, flips), store.read

    def slow(*where):
        meeting.wait()  # a deadlock, if they came one after the other
        return honest(*where)

    store.read = slow
    with ThreadPoolExecutor(3) as readers:
        assert torch.equal(store.moments(indices, flips, readers.map), alone)
