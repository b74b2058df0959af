"""Evaluation by COCO's and VOC's protocols, in restartable chunks."""
