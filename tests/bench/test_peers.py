"""Each peer takes a step that lowers its loss, and detects, from the same weights of the backbone."""

import json

import cv2
import numpy as np
import pytest
import timm
import torch
from refinedet.model import RefineDetConfig, Targets

from tests.bench.peers.models import PEERS, Peer, build_peer
from tests.bench.peers.train import Judge

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


def test_the_judge_counts_the_classes_it_is_given_in_their_order(tmp_path):
    """Objects of a third class are no misses, and labels follow the names, whatever the data set's ids."""
    (tmp_path / "val").mkdir()
    (tmp_path / "annotations").mkdir()
    cv2.imwrite(str(tmp_path / "val" / "a.png"), np.zeros((100, 200, 3), dtype=np.uint8))
    boxes = {1: [20, 10, 40, 50], 62: [100, 30, 80, 40], 3: [0, 0, 30, 30]}
    truth = {
        "images": [{"id": 7, "file_name": "a.png", "width": 200, "height": 100}],
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 62, "name": "chair"}],
        "annotations": [
            {"id": number, "image_id": 7, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for number, (category, box) in enumerate(boxes.items(), start=1)
        ],
    }
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(truth))

    class Knowing(Peer):
        def detect(self, images):
            assert images.shape == (1, 3, 64, 64)
            found = torch.tensor([boxes[62], boxes[1]], dtype=torch.float32)
            found[:, 2:] += found[:, :2]
            scale = torch.tensor([64 / 200, 64 / 100] * 2)
            return [{"boxes": found * scale, "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([1, 2])}]

    assert Judge(tmp_path, 64, ["chair", "person"]).score(Knowing())["AP"] == pytest.approx(1)
    assert Judge(tmp_path, 64, ["chair", "person", "car"]).score(Knowing())["AP"] == pytest.approx(2 / 3, abs=1e-3)
    assert Judge(tmp_path, 64, ["person", "chair"]).score(Knowing())["AP"] == 0
