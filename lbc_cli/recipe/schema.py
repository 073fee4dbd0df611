"""The schema of a recipe: what can be set, of which type, with which default.

One pydantic model per TOML table; every field's description is what `lbc recipe schema` publishes to editors. Names
follow timm's training script where it has the option. The options of a method are not here but beside the method
(`methods.METHODS`), because a new method must be one file and one line.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Epochs = Annotated[int, Field(gt=0, le=1_000_000)]  # a plan looks at every epoch
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch takes
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Table(BaseModel):
    """A recipe table: no unknown keys, no silent conversion, no change after validation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


class Model(Table):
    """Which model is trained and from what it starts."""

    name: str = Field(default="", description="timm model name; the command line's MODEL overrides it")
    pretrained: bool = Field(default=False, description="start from timm's pretrained weights")
    init: str = Field(default="", description="start from this weight file (safetensors); excludes pretrained")
    drop_rate: Probability | None = Field(default=None, description="dropout before the classifier; unset: the model's")
    drop_path_rate: Probability | None = Field(default=None, description="stochastic depth; unset: the model's own")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of timm.create_model")

    @model_validator(mode="after")
    def _one_start(self) -> Model:
        if self.pretrained and self.init:
            raise ValueError("pretrained and init exclude each other: keep one start for the weights")
        return self


class Budget(Table):
    """What the whole model may cost, for patterns that differ from layer to layer; one of the two, or none."""

    flops: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="kept share of the model's multiply-adds, stem and classifier included; 0: no budget"
    )
    params: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="kept share of the model's parameters; 0: no budget"
    )
    patterns: list[str] = Field(
        default=["2:4", "1:4", "1:8", "1:16"], description='what a layer may take; "dense" may be among them'
    )
    allocated: bool = Field(
        default=False, description="whether sparsity.layers is what the budget chose; a run writes it into its recipe"
    )


class Sparsity(Table):
    """The N:M pattern and where it applies. Unstructured methods have none: their `method.sparsity` takes its place."""

    pattern: str = Field(
        default="2:4",
        description='N:M: at most N of M consecutive input channels are kept; "" for unstructured methods',
    )
    vector: Positive = Field(default=1, description="V output channels share one mask (vector-wise N:M)")
    layers: dict[str, str] = Field(
        default_factory=dict,
        description='glob over layer names -> "N:M", "N:M/V" or "dense", "sparse" or "dense" for unstructured methods; '
        "the last glob that matches wins",
    )
    budget: Budget = Field(default_factory=Budget)


class Distill(Table):
    """A dense teacher that the student shall resemble (Hinton et al., 2015); none unless named."""

    teacher: str = Field(default="", description="timm name (its pretrained weights) or a weight file; empty: none")
    model: str = Field(default="", description="timm name of the teacher, where its file does not say it")
    alpha: Probability = Field(default=0.5, description="weight of the teacher's part in the loss")
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=4.0, description="T that softens both outputs"
    )


class Data(Table):
    """Where the images come from and how they reach the model."""

    source: str = Field(default="", description="digits, a folder, a tar, torch/NAME, hfds/NAME or wds/NAME")
    root: str = Field(default="", description="where torch/ and hfds/ sets lie; a folder is its own root")
    train_split: str = Field(default="train", description="name of the training split")
    val_split: str = Field(
        default="", description="name of the evaluation split; empty: val, validation or test, as found"
    )
    download: bool = Field(default=False, description="let torch/ data sets download themselves")
    class_map: str = Field(default="", description="file with one class name a line, fixing the class ids")
    batch_size: Positive = Field(default=256, description="images of a batch of one process, as in timm")
    eval_batch_size: Count = Field(default=0, description="images per evaluation batch; 0: batch_size")
    workers: Count = Field(default=4, description="loader processes")
    image_size: Count = Field(default=0, description="side in pixels; 0: the model's own")
    mean: list[float] = Field(default_factory=list, description="per-channel mean; empty: the model's own")
    std: list[float] = Field(default_factory=list, description="per-channel deviation; empty: the model's own")
    interpolation: str = Field(default="", description="resampling at evaluation; empty: the model's own")
    crop_pct: Rate = Field(default=0.0, description="centre crop share at evaluation; 0: the model's own")
    check: Literal["fast", "full", "off"] = Field(
        default="fast", description="before step 1: fast reads headers and ends of every image, full decodes them"
    )
    unreadable: Literal["fail", "skip"] = Field(default="fail", description="what to do with unreadable images")


class Augment(Table):
    """Augmentation of the training images; the names are timm's."""

    scale: list[float] = Field(
        default=[0.08, 1.0], min_length=2, max_length=2, description="area of random resized crop"
    )
    ratio: list[float] = Field(default=[0.75, 4 / 3], min_length=2, max_length=2, description="aspect of the crop")
    hflip: Probability = Field(default=0.5, description="horizontal flip")
    vflip: Probability = Field(default=0.0, description="vertical flip")
    color_jitter: Rate = Field(default=0.0, description="colour jitter; 0: none")
    auto_augment: str = Field(default="", description='timm policy such as "rand-m9-mstd0.5-inc1"; empty: none')
    interpolation: str = Field(default="random", description="resampling at training")
    reprob: Probability = Field(default=0.0, description="random erasing")
    remode: Literal["const", "rand", "pixel"] = Field(default="pixel", description="how erased pixels are filled")
    recount: Positive = Field(default=1, description="erased rectangles per image")
    mixup: Rate = Field(default=0.0, description="mixup alpha; 0: off")
    cutmix: Rate = Field(default=0.0, description="cutmix alpha; 0: off")
    mixup_prob: Probability = Field(default=1.0, description="share of batches that are mixed")
    mixup_switch_prob: Probability = Field(default=0.5, description="cutmix rather than mixup when both are on")
    mixup_mode: Literal["batch", "pair", "elem"] = Field(default="batch", description="how mixing pairs are drawn")
    mixup_off_epoch: Count = Field(default=0, description="no mixing from this epoch on; 0: always")
    aug_repeats: Count = Field(default=0, description="repeated augmentation: copies of an image per batch; 0: off")
    smoothing: Probability = Field(default=0.0, description="label smoothing")


class Optimizer(Table):
    """The optimizer of the weights, created by timm."""

    name: str = Field(
        default="sgd",
        description="timm optimizer name, element-wise; timm's sgd has Nesterov's momentum unless kwargs say no",
    )
    lr: Rate = Field(default=0.1, description="peak learning rate")
    lr_base_size: Count = Field(
        default=0,
        description="images of an update that lr is meant for: lr is scaled by batch_size x accumulate x processes "
        "over it; 0: lr as it is",
    )
    lr_base_scale: Literal["linear", "sqrt"] = Field(default="linear", description="how lr follows lr_base_size")
    momentum: Rate = Field(default=0.9, description="momentum of SGD-like optimizers")
    weight_decay: Rate = Field(default=5e-4, description="weight decay")
    decay_1d: bool = Field(default=False, description="decay biases and norms as well")
    layer_decay: Rate = Field(default=0.0, description="layer-wise learning-rate decay; 0: off")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments: betas, eps, nesterov, ...")


class Schedule(Table):
    """The learning rate, advanced at every update; created by timm."""

    name: Literal["cosine", "step", "multistep", "poly", "tanh", "constant"] = Field(
        default="cosine", description="shape after the warm-up"
    )
    warmup_epochs: Count = Field(default=5, description="linear warm-up, part of the epochs")
    warmup_lr: Rate = Field(default=0.0, description="where the warm-up starts")
    min_lr: Rate = Field(default=0.0, description="where cosine, poly and tanh end")
    decay_epochs: Positive = Field(default=30, description="step: epochs between decays")
    decay_milestones: list[int] = Field(default_factory=list, description="multistep: epochs of the decays")
    decay_rate: Rate = Field(default=0.1, description="step, multistep: factor of a decay; poly: power")


class Train(Table):
    """The loop."""

    epochs: Epochs = Field(default=120, description="passes over the training data, warm-up included")
    seed: Seed = Field(default=0, description="seeds weights, order and augmentation")
    device: str = Field(default="auto", description="cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    amp: Literal["off", "bfloat16", "float16"] = Field(default="off", description="autocast type")
    channels_last: bool = Field(default=False, description="NHWC memory format")
    compile: bool = Field(default=False, description="torch.compile the model")
    accumulate: Positive = Field(default=1, description="backward passes per update")
    clip_grad: Rate = Field(default=0.0, description="gradient clipping; 0: off")
    clip_mode: Literal["norm", "value", "agc"] = Field(default="norm", description="what clip_grad bounds")
    bce: bool = Field(default=False, description="binary cross-entropy instead of cross-entropy")
    ema: bool = Field(default=False, description="average the weights, evaluate and ship the average as well")
    ema_decay: Probability = Field(default=0.9998, description="decay of the average per update")
    eval_every: Positive = Field(default=1, description="epochs between evaluations; the last is always one")
    log_every: Positive = Field(default=50, description="updates between step records")
    save_every: Positive = Field(default=1, description="epochs between saved states")
    save_steps: Count = Field(default=0, description="updates between saved states within an epoch; 0: none")
    save_minutes: Rate = Field(
        default=15.0, description="minutes after which a state is saved within an epoch as well; 0: none"
    )
    sync_bn: bool = Field(
        default=False, description="batch norms take their statistics over all processes of a distributed run (CUDA)"
    )


class Track(Table):
    """Tools that follow the run beside its own files; each needs the extra of its name."""

    tools: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="tensorboard, wandb, or both"
    )
    project: str = Field(default="lbc", description="wandb: name of the project")
    name: str = Field(default="", description="wandb: name of the run; empty: the run folder's")
    mode: Literal["online", "offline"] = Field(default="online", description="wandb: offline keeps it on the disk")


class Recipe(Table):
    """A whole recipe, resolved: every key has a value."""

    description: str = Field(default="", description="one line: what this recipe is for")
    task: str = Field(default="classification", description="what is learnt; see TASKS")
    model: Model = Field(default_factory=Model)
    sparsity: Sparsity = Field(default_factory=Sparsity)
    method: dict[str, Any] = Field(
        default_factory=lambda: {"name": "lbc"}, description="name = one of METHODS, and that method's own options"
    )
    distill: Distill = Field(default_factory=Distill)
    data: Data = Field(default_factory=Data)
    augment: Augment = Field(default_factory=Augment)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    train: Train = Field(default_factory=Train)
    track: Track = Field(default_factory=Track)
