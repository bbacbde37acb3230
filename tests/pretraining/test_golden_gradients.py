"""The original's gradients, made by running the published Keras code (tests/data/golden/README.md)."""

import numpy as np
import pytest
import torch

from proteinbert_fast.checkpoints.layouts import weight_layouts
from tests.test_golden import BACKENDS, pretraining_losses


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_golden_gradients(tiny_model, golden, backend, dtype):
    tiny_model.backend = backend
    sum(pretraining_losses(tiny_model.to(dtype), golden)).backward()
    gradients = {name: p.grad for name, p in tiny_model.named_parameters()}
    offsets, index = golden["grad_sample_offsets"], golden["grad_sample_index"]
    layouts = weight_layouts(tiny_model.config)
    assert len(layouts) == len(golden["grad_l2"]) == 53
    # The samples are stored as float32; Keras in float32 is itself off by 2.4e-5 of a tensor's largest entry.
    rtol = 2e-7 if dtype == torch.float64 else 3e-5
    for i, layout in enumerate(layouts):
        ours = layout.to_official(gradients[layout.key]).astype(np.float64).ravel()
        largest = golden["grad_maxabs"][i]
        sample = slice(offsets[i], offsets[i + 1])
        np.testing.assert_allclose(
            ours[index[sample]],
            golden["grad_sample_value"][sample],
            atol=rtol * largest,
            rtol=rtol,
            err_msg=layout.key,
        )
        scale = largest * np.sqrt(ours.size)
        for probe, value in [
            ("sum", ours.sum()),
            ("l2", np.sqrt((ours**2).sum())),
            ("maxabs", np.abs(ours).max()),
            ("cosprobe", ours @ np.cos(np.arange(ours.size))),
        ]:
            np.testing.assert_allclose(value, golden[f"grad_{probe}"][i], atol=rtol * scale, rtol=0, err_msg=layout.key)
