"""The shape of `megatron.training.training`, for tests of hooks: the functions that are hooked, and who calls them."""

import types

args = types.SimpleNamespace(curr_iteration=0, iteration=0, train_iters=4, log_interval=2)
printed, scalars, logged = [], [], []


class Writer:
    def add_scalar(self, name, value, iteration):
        scalars.append((name, value, iteration))


class WandbWriter:
    def log(self, metrics, iteration):
        logged.append((metrics, iteration))


def get_args():
    return args


def get_tensorboard_writer():
    return Writer()


def get_wandb_writer():
    return WandbWriter()


def print_rank_0(line):
    printed.append(line)


print_rank_last = print_rank_0


def setup_model_and_optimizer(model_type, model_provider_func=None, checkpointing_context=None):
    return model_provider_func(), "optimizer", "scheduler"


def get_forward_backward_func(pp_size=None, vp_size=None):
    def schedule(*, forward_step_func, data_iterator, model, num_microbatches, forward_only=False):
        for i in range(num_microbatches):
            for chunk in model if i % 2 else reversed(model):  # chunks take turns, as in an interleaved pipeline
                forward_step_func(data_iterator, chunk)

    return schedule


def training_log(loss_dict, total_loss_dict, learning_rate, iteration, loss_scale):
    printed.append(f"iteration {iteration}")


def train(forward_step, model):
    schedule = get_forward_backward_func()
    for iteration in range(args.train_iters):
        args.curr_iteration = iteration
        schedule(
            forward_step_func=forward_step, data_iterator=None, model=model, num_microbatches=2, forward_only=False
        )
        training_log({}, {}, 0.1, iteration + 1, loss_scale=1.0)
        if iteration % 2:
            evaluate(forward_step, model)


def evaluate(forward_step, model):
    schedule = get_forward_backward_func()
    for _ in range(2):
        schedule(forward_step_func=forward_step, data_iterator=None, model=model, num_microbatches=1, forward_only=True)


def pretrain(model_provider, forward_step):
    model, _, _ = setup_model_and_optimizer("model", model_provider, checkpointing_context={})
    train(forward_step, model)
    return model
