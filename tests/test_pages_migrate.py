"""The migration page: its lines for sentence-transformers work there."""

from __future__ import annotations

import re

import pytest

from support.paths import ROOT

pytest.importorskip("torch")
# It brings along what is no dependency of ours; skipped, visibly, without it.
pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")

from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from gpusampler import PatchBatchSampler, PatchGroups, Temperature

PAGE = ROOT / "docs" / "how-to" / "migrate.md"
SIZES = [80, 20, 9]
EPOCHS = 2


def function_of_the_page():
    """``one_dataset_a_batch``, as it stands there."""
    source = re.search(r"^def one_dataset_a_batch.*?^    \)$", PAGE.read_text(), re.S | re.M)
    names = {
        "PatchBatchSampler": PatchBatchSampler,
        "PatchGroups": PatchGroups,
        "Temperature": Temperature,
    }
    exec(source[0], names)
    return names["one_dataset_a_batch"]


def test_sentence_transformers_train_on_one_dataset_a_batch(tmp_path):
    words = {"[UNK]": 0} | {f"{part}{i}": 1 + 80 * part + i for part in range(3) for i in range(80)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu")
    train = DatasetDict(
        {
            f"part{part}": Dataset.from_dict(
                {
                    "a": [f"{part}{i}" for i in range(size)],
                    "b": [f"{part}{i}" for i in range(size)],
                    "score": [float(i % 2) for i in range(size)],
                }
            )
            for part, size in enumerate(SIZES)
        }
    )
    seen = []

    class Seeing(SentenceTransformerTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            words = inputs["a_input_ids"].tolist()
            seen.append([divmod(word - 1, 80) for word in words])
            return super().compute_loss(model, inputs, *args, **kwargs)

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=8,
        multi_dataset_batch_sampler=function_of_the_page(),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    Seeing(model=model, args=arguments, train_dataset=train, loss=CoSENTLoss(model)).train()

    first = [0, 80, 100]
    rows = [[first[part] + i for part, i in batch] for batch in seen]
    groups = PatchGroups.from_counts(SIZES)
    alone = PatchBatchSampler(groups, 8, seed=arguments.seed, weights=Temperature(2))
    expected = [batch.indices.tolist() for epoch in range(EPOCHS) for batch in alone.batches(epoch)]
    assert rows == expected
    assert all(len({part for part, _ in batch}) == 1 for batch in seen)
