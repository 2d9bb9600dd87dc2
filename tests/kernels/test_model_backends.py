"""On every backend a network has the same state_dict, logits and gradients."""

import pytest
import torch
from conftest import BACKENDS

import attnkern
from attnkern.models import create_model

#: One network of each kind of attention, as small as possible.
NETWORKS = {
    "vgg_gap": {}, "vgg_pan": {}, "vgg_att2_concat_dp": {}, "vgg_att3_concat_pc": {}, "rn164_att2": {"blocks": 1},
    "vgg_aib": {}, "vgg_aib_qt": {}, "wrn28_10_abn": {"blocks": 1}, "wrn28_10_aib_qt": {"blocks": 1},
    "mobilenet_v3_large_positionwise": {}, "efficientnet_b0_window": {},
}  # fmt: skip


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "reference"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_with_the_reference(name, backend, device):
    if name.startswith(("mobilenet", "efficientnet")):
        pytest.importorskip("torchvision")
    images, labels = torch.rand(2, 3, 20, 24).to(device), torch.tensor([0, 3], device=device)
    found, state = {}, None
    for which in (backend, "reference"):
        torch.manual_seed(0)
        model = create_model(name, 4, width=0.0625, **NETWORKS[name]).to(device)
        state = state or model.state_dict()
        model.load_state_dict(state)
        # In evaluation mode, batch statistics and dropout do not amplify rounding.
        model.eval()
        with attnkern.use_backend(which):
            logits = model(images)
            model.loss(logits, labels).backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found[which] = logits.detach(), gradients
    torch.testing.assert_close(found[backend][0], found["reference"][0], rtol=1e-4, atol=1e-5)
    expected = found["reference"][1]
    assert found[backend][1].keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    assert largest > 0
    for key, gradient in expected.items():
        assert (found[backend][1][key] - gradient).norm() <= 1e-3 * (gradient.norm() + 0.01 * largest), key
