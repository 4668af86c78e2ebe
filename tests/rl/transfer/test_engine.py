"""A real engine takes weights from a direct transfer; one that is torn keeps it from generating."""

import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rl.models import tiny
from rl.rollout.config import EngineConfig, Sampling
from rl.rollout.weights import TornWeights
from rl.transfer.links import Limits, Rendezvous, source_name
from rl.transfer.plan import TensorSpec, make_plan
from rl.transfer.receiver import Incoming, receiver_names
from rl.transfer.sender import Sender
from rl.transfer.staged_sender import StagedSender
from rl.transfer.turns import staging_bytes, turns_of
from rl.types import Prompt
from tests.rl.rollout.engine_process import EngineProcess

LIMITS = Limits(join_s=60.0, start_s=60.0, bucket_s=20.0)


def in_thread(function, *args):
    box = []

    def work():
        try:
            box.append(function(*args))
        except Exception as error:
            box.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, box


@pytest.mark.slow
@pytest.mark.parametrize("staged", [False, True], ids=["broadcast", "staged"])
def test_an_engine_takes_a_direct_transfer_and_notices_a_torn_one(tmp_path, staged):
    model = {name: tiny.qwen3_moe(tmp_path / name, seed=seed) for name, seed in (("A", 1), ("B", 2))}
    new = load_file(model["B"] / "model.safetensors")
    plan = make_plan({0: [TensorSpec(n, tuple(t.shape), "float32") for n, t in new.items()]}, 300_000)
    keys = {name: (i, 0, 0) for i, name in enumerate(new)}
    staged_sender = StagedSender(0, torch.device("cpu"))
    rendezvous = Rendezvous("127.0.0.1")
    prompt = Prompt("p", 0, 0, "", np.arange(3, 9, dtype=np.int32), None, {})
    sampling = Sampling(max_tokens=8, ignore_eos=True)

    def logprobs(engine, name):
        return engine.call("generate", prompt, [name], sampling, 5)[0].rollout_logprobs

    def update(engine, version, stop_after):
        """A transfer from this process; with ``stop_after``, its source fails after so many tensors."""
        membership = rendezvous.generation([source_name(0)], receiver_names([0], 1), "gloo", LIMITS)
        sender = staged_sender if staged else Sender(source_name(0), torch.device("cpu"))

        def pairs():
            for i, (name, tensor) in enumerate(new.items()):
                if i == stop_after:
                    raise RuntimeError("the source fails")
                yield name, tensor

        if staged:
            engine.call("transfer_join", membership, sender.join(membership, staging_bytes(plan)))
            exported = ((keys[name], [(name, tensor)]) for name, tensor in pairs())
            thread, box = in_thread(sender.hand_over, plan, turns_of(plan, keys), exported)
        else:
            joining = engine.submit("transfer_join", membership)
            sender.join(membership)
            joining.result(60)
            thread, box = in_thread(sender.send, plan, 0, pairs())
        try:
            engine.call("update_weights", version, [Incoming(plan)], plan.manifest)
        finally:
            thread.join(60)
            sender.close()
        return box[0]

    def config(name):
        return EngineConfig(model_path=str(model[name]), max_model_len=64, max_num_seqs=4, initial_version=0)

    with EngineProcess(config("B")) as engine:
        wanted = logprobs(engine, "x")
    with EngineProcess(config("A")) as engine:
        assert not np.allclose(logprobs(engine, "x"), wanted)
        with pytest.raises(TornWeights, match="the source fails"):
            update(engine, 1, len(new) // 2)
        with pytest.raises(TornWeights, match="broke off"):
            logprobs(engine, "x")
        report = update(engine, 1, None)
        assert report.buckets == len(plan.buckets[0]) > 1
        assert np.allclose(logprobs(engine, "x"), wanted, atol=1e-5)
