"""Each peer takes a step that lowers its loss, and detects, from the same weights of the backbone."""

import pytest
import timm
import torch
from refinedet.model import RefineDetConfig, Targets

from tests.bench.peers.models import PEERS, build_peer

CONFIG = RefineDetConfig(
    backbone="tf_efficientnet_lite0", input_size=128, num_classes=5, tcb_channels=16, prediction_block=False
)


@pytest.mark.parametrize("name", sorted(PEERS))
def test_a_peer_learns_and_detects(name):
    torch.manual_seed(0)
    weights = timm.create_model(CONFIG.backbone).state_dict()
    options = {} if name == "refinedet" else {"channels": 32}
    peer = build_peer(name, CONFIG, weights, **options)
    stem = next(value for key, value in peer.state_dict().items() if key.endswith("conv_stem.weight"))
    assert torch.equal(stem, weights["conv_stem.weight"])
    images = torch.randint(0, 256, (4, 3, 128, 128), dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 12, 70, 80], [50, 40, 120, 110]])
    targets = [Targets(boxes, torch.tensor([1, 3])) for _ in range(3)]
    targets.append(Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)))
    optimizer = torch.optim.SGD(peer.parameters(), lr=0.01, momentum=0.9)
    seen = []
    for _ in range(6):
        loss = torch.stack(list(peer.losses(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 10)
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < seen[0]
    with torch.no_grad():
        found = peer.eval().detect(images)
    assert len(found) == 4
    for one in found:
        assert len(one["boxes"]) == len(one["scores"]) == len(one["labels"])
        assert one["labels"].numel() == 0 or 1 <= int(one["labels"].min()) <= int(one["labels"].max()) <= 5
