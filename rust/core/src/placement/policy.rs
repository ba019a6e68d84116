//! What is asked of a placement: the policy of the newcomer, and the models that run already.

use std::fmt;
use std::str::FromStr;

use crate::gpu::Gpu;

/// Which of several GPUs that would do is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// The GPU that has the least left over, so that the large gaps stay for large models.
    #[default]
    SingleGpuPreferred,
    /// The emptiest GPU, so that models share as few GPUs as they can.
    Distribute,
    /// A GPU in use before an empty one, filled to the end, so that whole GPUs stay empty.
    Pack,
}

impl Strategy {
    /// Every strategy, in the order in which messages list them.
    pub const ALL: [Self; 3] = [Self::SingleGpuPreferred, Self::Distribute, Self::Pack];

    /// Its name in configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::SingleGpuPreferred => "single-gpu-preferred",
            Self::Distribute => "distribute",
            Self::Pack => "pack",
        }
    }
}

/// How much of a model may run on the CPU when the GPUs are too small for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CpuUse {
    /// Nothing: rather refuse.
    #[default]
    Never,
    /// Some of its layers.
    Partial,
    /// Some of its layers, or all of it.
    Allow,
}

impl CpuUse {
    /// Every choice, in the order in which messages list them.
    pub const ALL: [Self; 3] = [Self::Never, Self::Partial, Self::Allow];

    /// Its name in configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::Partial => "partial",
            Self::Allow => "allow",
        }
    }
}

/// A word that names none of the choices there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownChoice {
    /// The word.
    pub given: String,
    /// The words it could have been.
    pub choices: &'static [&'static str],
}

impl fmt::Display for UnknownChoice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "\"{}\" is none of \"{}\"",
            self.given,
            self.choices.join("\", \"")
        )
    }
}

impl std::error::Error for UnknownChoice {}

impl FromStr for Strategy {
    type Err = UnknownChoice;

    fn from_str(name: &str) -> Result<Self, UnknownChoice> {
        let found = Self::ALL.into_iter().find(|choice| choice.name() == name);
        found.ok_or_else(|| UnknownChoice {
            given: name.to_owned(),
            choices: &["single-gpu-preferred", "distribute", "pack"],
        })
    }
}

impl FromStr for CpuUse {
    type Err = UnknownChoice;

    fn from_str(name: &str) -> Result<Self, UnknownChoice> {
        let found = Self::ALL.into_iter().find(|choice| choice.name() == name);
        found.ok_or_else(|| UnknownChoice {
            given: name.to_owned(),
            choices: &["never", "partial", "allow"],
        })
    }
}

/// One GPU as a person names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GpuName {
    /// By its index, which moves when cards are added.
    Index(u32),
    /// By its UUID, which does not. The UUID of a physical GPU names its MIG devices too.
    Uuid(String),
}

impl GpuName {
    /// Whether this GPU is meant.
    pub fn names(&self, gpu: &Gpu) -> bool {
        match self {
            Self::Index(index) => *index == gpu.index,
            Self::Uuid(uuid) => *uuid == gpu.uuid || Some(uuid) == gpu.parent_uuid.as_ref(),
        }
    }
}

/// Where a model may go and what must be left there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Policy {
    /// Which of several GPUs that would do is taken.
    pub strategy: Strategy,
    /// Bytes that must stay free on every GPU that is used.
    pub headroom_bytes: u64,
    /// The same for single GPUs, in place of `headroom_bytes`; of several that name one GPU, the
    /// largest.
    pub headroom_by_gpu: Vec<(GpuName, u64)>,
    /// The largest number of GPUs for one model; `None` for as many as llama.cpp can use (16).
    pub max_gpus: Option<u32>,
    /// The only GPUs that may be used; `None` for all.
    pub allowed: Option<Vec<GpuName>>,
    /// How much of the model may run on the CPU.
    pub cpu: CpuUse,
    /// Whether some layers may stay on the CPU; `cpu` of `Partial` or `Allow` says the same.
    pub partial: bool,
    /// The newcomer's priority: models of a higher one are not evicted for it.
    pub priority: i32,
}

impl Policy {
    /// Bytes that must stay free on this GPU.
    pub fn headroom_on(&self, gpu: &Gpu) -> u64 {
        let own = self
            .headroom_by_gpu
            .iter()
            .filter(|(name, _)| name.names(gpu));
        own.map(|(_, bytes)| *bytes)
            .max()
            .unwrap_or(self.headroom_bytes)
    }

    /// Whether some layers may stay on the host.
    pub fn allows_partial(&self) -> bool {
        self.partial || self.cpu != CpuUse::Never
    }
}

/// A model that holds GPU memory, and what it would cost to lose it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Running {
    /// Its id, handed back when it should leave.
    pub id: String,
    /// The bytes it holds, by GPU UUID: what comes back when it leaves.
    pub bytes_by_gpu: Vec<(String, u64)>,
    /// Whether it answers a request now, or is loading. A busy model is never evicted.
    pub busy: bool,
    /// Whether it must stay. A pinned model is never evicted.
    pub pinned: bool,
    /// Seconds since its last request ended.
    pub idle_seconds: f64,
    /// Its priority: a newcomer of a lower one does not evict it.
    pub priority: i32,
    /// Seconds that loading it again takes, if measured; else taken from its size.
    pub reload_seconds: Option<f64>,
    /// How often it was asked for lately, older requests counting for less; `None` counts as once.
    pub recent_requests: Option<f64>,
}

impl Running {
    /// Bytes that a server is taken to load in a second while nothing has been measured:
    /// a common solid-state drive, not a warm page cache.
    const LOADED_PER_SECOND: f64 = 2e9;
    /// After this many idle seconds a model is held to be half as likely to be asked for soon.
    const IDLE_HALVES_AFTER: f64 = 60.0;

    /// Whether it may be evicted for a newcomer of this priority.
    pub fn may_leave_for(&self, priority: i32) -> bool {
        !self.busy && !self.pinned && self.priority <= priority
    }

    /// What evicting it costs: the microseconds of reloading that are to be expected.
    ///
    /// `reload × 4^priority × recent requests ÷ (1 + idle ÷ 60 s)`, priorities beyond ±8 counting
    /// as ±8, and never less than 1, so that of two sets that do, one that contains the other
    /// never wins.
    ///
    /// What comes often is wanted again soon, and what rests is less so the longer it does:
    /// requests come in runs, of which the pauses between them are heavy-tailed, so that the
    /// odds of one more fall with the time since the last. Either alone is worse: by recency a
    /// popular model leaves in every pause, by frequency one that was popular yesterday stays.
    /// Bytes are no part of it: the search weighs what each set frees.
    pub fn eviction_cost(&self) -> u64 {
        const MOST: f64 = 1e15;
        let known = |number: f64| number.is_finite() && number >= 0.0;
        let bytes: u128 = self.bytes_by_gpu.iter().map(|(_, n)| u128::from(*n)).sum();
        #[expect(clippy::cast_precision_loss, reason = "a price, not a size")]
        let from_size = bytes as f64 / Self::LOADED_PER_SECOND;
        let reload = self.reload_seconds.filter(|&seconds| known(seconds));
        let idle = if known(self.idle_seconds) {
            self.idle_seconds
        } else {
            0.0
        };
        let requests = self.recent_requests.filter(|&count| known(count));
        let cost = 1e6
            * reload.unwrap_or(from_size)
            * priority_factor(self.priority)
            * requests.unwrap_or(1.0)
            / (1.0 + idle / Self::IDLE_HALVES_AFTER);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "held between 1 and a number that fits"
        )]
        let cost = cost.clamp(1.0, MOST) as u64;
        cost
    }
}

/// How much more a model of this priority is worth than one of priority 0: four times for each
/// step, steps beyond ±8 not counted.
pub(crate) fn priority_factor(priority: i32) -> f64 {
    4.0_f64.powi(priority.clamp(-8, 8))
}
