"""The two layouts of the same weights."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proteinbert_fast import ProteinBert
from proteinbert_fast.checkpoints.layouts import (
    blocks_in,
    official_from_state_dict,
    official_names,
    state_dict_from_official,
    state_dict_shapes,
    weight_layouts,
)
from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.errors import CheckpointError

from .conftest import ODD_SIZES, random_state_dict, same_tensors


def random_official(config):
    generator = np.random.default_rng(3)
    shapes = [layout.official_shape for layout in weight_layouts(config)]
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_order_and_shapes_are_the_originals(golden_meta):
    config = ProteinBertConfig(n_annotations=24, d_local=32, d_global=64, n_blocks=2, n_heads=4, d_key=16)
    layouts = weight_layouts(config)
    assert [layout.official_name for layout in layouts] == golden_meta["weight_names"]
    assert [list(layout.official_shape) for layout in layouts] == golden_meta["weight_shapes"]


def test_published_sizes():
    layouts = weight_layouts(ProteinBertConfig())
    assert len(layouts) == 145
    assert sum(int(np.prod(layout.shape)) for layout in layouts) == 15_981_321
    assert layouts[5].official_shape == (9, 128, 128)
    assert layouts[17].official_shape == (4, 512, 64)
    assert layouts[-2].official_shape == (512, 8943)


def test_keys_and_shapes_are_those_of_the_model():
    model = ProteinBert(ODD_SIZES, backend="reference")
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == state_dict_shapes(ODD_SIZES)


def test_each_layout_element_by_element():
    arrays = dict(zip(official_names(2), random_official(ODD_SIZES), strict=True))
    state = state_dict_from_official(list(arrays.values()), ODD_SIZES)
    kernel = arrays["wide-conv-block2/kernel"]  # (tap, in, out)
    assert state["blocks.1.wide_conv.weight"][4, 2, 8] == kernel[8, 2, 4]
    dense = arrays["global-to-seq-dense-block1/kernel"]  # (in, out)
    assert state["blocks.0.broadcast.weight"][3, 11] == dense[11, 3]
    query = arrays["global-attention-block2/Wq"]  # (head, in, out of a head)
    assert state["blocks.1.query.weight"][2 * 2 + 1, 7] == query[2, 7, 1]
    value = arrays["global-attention-block1/Wv"]
    assert state["blocks.0.value.weight"][1 * 4 + 3, 4] == value[1, 4, 3]
    assert torch.equal(state["annotation_input.weight"], torch.from_numpy(arrays["dense-global-input/kernel"]))
    assert torch.equal(state["annotation_head.weight"], torch.from_numpy(arrays["output-annotations/kernel"]).T)


def test_both_ways_give_the_same_numbers():
    arrays = random_official(ODD_SIZES)
    back = official_from_state_dict(state_dict_from_official(arrays, ODD_SIZES), ODD_SIZES)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, back, strict=True))
    assert all(array.flags.c_contiguous and array.dtype == np.float32 for array in back)
    state = random_state_dict(ODD_SIZES)
    assert same_tensors(state_dict_from_official(official_from_state_dict(state, ODD_SIZES), ODD_SIZES), state)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_both_ways_at_any_size(annotations, local, per_head, heads, key, blocks):
    config = ProteinBertConfig(annotations, local, per_head * heads, blocks, heads, key, 3, 2)
    state = random_state_dict(config)
    assert same_tensors(state_dict_from_official(official_from_state_dict(state, config), config), state)


def test_tensors_do_not_share_memory_with_the_arrays():
    arrays = random_official(ODD_SIZES)
    state = state_dict_from_official(arrays, ODD_SIZES)
    before = {key: tensor.clone() for key, tensor in state.items()}
    for array in arrays:
        array += 1
    assert same_tensors(state, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_become_float32(dtype):
    state = {key: tensor.to(dtype) for key, tensor in random_state_dict(ODD_SIZES).items()}
    back = state_dict_from_official(official_from_state_dict(state, ODD_SIZES), ODD_SIZES)
    assert all(torch.equal(back[key], state[key].float()) for key in state)


def test_number_of_blocks():
    assert blocks_in(145) == 6
    assert blocks_in(30) == 1
    assert blocks_in(7) is None
    assert blocks_in(146) is None
    assert blocks_in(0) is None
    assert blocks_in(7 + 23 * 10**9) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("token_head.bias"), "1 of 53 tensors are missing, the first is token_head.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "54 tensors, expected 53 for 2 blocks"),
        (
            lambda s: s.update({"token_head.bias": torch.zeros(25)}),
            "token_head.bias has shape (25,), expected (26,)",
        ),
        (
            lambda s: s["token_head.bias"].fill_(float("nan")),
            "token_head.bias holds 26 NaN or infinite values",
        ),
    ],
)
def test_wrong_state_dicts(change, message):
    state = random_state_dict(ODD_SIZES)
    change(state)
    with pytest.raises(CheckpointError) as error:
        official_from_state_dict(state, ODD_SIZES, "here")
    assert str(error.value).startswith(f"here: {message}")


def test_wrong_official_lists():
    arrays = random_official(ODD_SIZES)
    with pytest.raises(CheckpointError, match="52 arrays, expected 53"):
        state_dict_from_official(arrays[:-1], ODD_SIZES)
    with pytest.raises(CheckpointError, match=r"dense-global-input/kernel has shape \(7, 12\), expected \(8, 12\)"):
        state_dict_from_official(arrays, dataclasses.replace(ODD_SIZES, n_annotations=8))
