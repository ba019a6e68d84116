//! `place`: the decision for a real model, with its estimate and in words.

use std::borrow::Borrow;
use std::cell::RefCell;
use std::fmt;

use super::decide::{Decision, MemoryModel, decide};
use super::explain;
use super::policy::{Policy, Running};
use super::refusal;
use crate::estimate::{
    Companions, DeviceMemory, EstimateError, EstimateOptions, MemoryEstimate, estimate_with,
    layer_costs,
};
use crate::gpu::Gpu;
use crate::model::ModelFacts;

/// How a model is spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// All its layers on one GPU.
    Single,
    /// All its layers on several GPUs.
    Multi,
    /// Some layers on GPUs, the others on the host.
    Partial,
    /// All its layers on the host.
    Cpu,
}

impl Mode {
    /// The name in Python and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::Multi => "multi",
            Self::Partial => "partial",
            Self::Cpu => "cpu",
        }
    }
}

/// A GPU that a model is placed on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PlacedDevice {
    /// Its identity, to be handed to the server in this order.
    pub uuid: String,
    /// Its index, for display.
    pub index: u32,
    /// Layers it holds, the output layer counted.
    pub layers: u32,
    /// Everything it will hold for the model.
    pub total_bytes: u64,
}

/// Where a model goes, what must leave for it, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// How it is spread.
    pub mode: Mode,
    /// The GPUs, in the order in which the server must be given them.
    pub devices: Vec<PlacedDevice>,
    /// Layers on GPUs, the output layer counted (`-ngl`).
    pub gpu_layers: u32,
    /// Layers of each GPU as proportions (`-ts`): llama.cpp deals them out exactly so.
    pub tensor_split: Vec<f32>,
    /// Ids of the running models that must leave first, the cheapest to lose first.
    pub evict: Vec<String>,
    /// What it takes there.
    pub estimate: MemoryEstimate,
    /// Why there, in words.
    pub reason: String,
}

/// A model fits nowhere where its policy lets it go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DoesNotFit {
    /// What the closest attempt needs over all its GPUs.
    pub required_bytes: u64,
    /// How much more that is than they could give; 0 where they have enough together, but no
    /// split of the layers fits.
    pub short_by_bytes: u64,
    /// What each GPU that may be used could give, by UUID, once every idle model has left.
    pub free_bytes_by_gpu: Vec<(String, u64)>,
    /// What would make it fit, each tried; `None` where nothing small does.
    pub smallest_change: Option<String>,
    /// All of it, for a person.
    pub message: String,
}

/// Why there is no placement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlaceError {
    /// The model or its options cannot be estimated.
    Estimate(EstimateError),
    /// It fits nowhere.
    DoesNotFit(Box<DoesNotFit>),
}

impl From<EstimateError> for PlaceError {
    fn from(error: EstimateError) -> Self {
        Self::Estimate(error)
    }
}

impl fmt::Display for PlaceError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Estimate(error) => error.fmt(formatter),
            Self::DoesNotFit(refusal) => formatter.write_str(&refusal.message),
        }
    }
}

impl std::error::Error for PlaceError {}

/// What has been estimated of one model with one set of options.
///
/// Estimating a split takes longer than all the rest of a decision; who asks again about the
/// same model with the same options hands this back and is spared it.
#[derive(Debug, Default)]
pub struct Remembered {
    layer_bytes: Vec<u64>,
    splits: Vec<(Vec<u32>, MemoryEstimate)>,
}

impl Remembered {
    /// Splits are forgotten, the oldest first, beyond this number.
    const MOST_SPLITS: usize = 64;
}

/// A model with its options, as the search asks for it.
pub(crate) struct Estimated<'a> {
    facts: &'a ModelFacts,
    companions: Companions<'a>,
    options: EstimateOptions,
    layer_bytes: Vec<u64>,
    splits: RefCell<Vec<(Vec<u32>, MemoryEstimate)>>,
}

impl<'a> Estimated<'a> {
    pub(crate) fn new(
        facts: &'a ModelFacts,
        options: &EstimateOptions,
        companions: Companions<'a>,
    ) -> Result<Self, EstimateError> {
        Self::remembering(facts, options, companions, Remembered::default())
    }

    fn remembering(
        facts: &'a ModelFacts,
        options: &EstimateOptions,
        companions: Companions<'a>,
        remembered: Remembered,
    ) -> Result<Self, EstimateError> {
        let options = EstimateOptions {
            devices: 1,
            tensor_split: None,
            ..options.clone()
        };
        let Remembered {
            mut layer_bytes,
            splits,
        } = remembered;
        if layer_bytes.is_empty() {
            let costs = layer_costs(facts, &options)?;
            layer_bytes = costs.layers;
            layer_bytes.push(costs.output);
        }
        Ok(Self {
            facts,
            companions,
            options,
            layer_bytes,
            splits: RefCell::new(splits),
        })
    }

    fn into_remembered(self) -> Remembered {
        Remembered {
            layer_bytes: self.layer_bytes,
            splits: self.splits.into_inner(),
        }
    }

    /// Reads something of the estimate when the last layers are dealt out so.
    fn split<T>(
        &self,
        counts: &[u32],
        read: impl FnOnce(&MemoryEstimate) -> T,
    ) -> Result<T, EstimateError> {
        let mut splits = self.splits.borrow_mut();
        if let Some((_, estimate)) = splits.iter().find(|(known, _)| known == counts) {
            return Ok(read(estimate));
        }
        let options = EstimateOptions {
            gpu_layers: Some(
                counts
                    .iter()
                    .fold(0, |sum, count| sum.saturating_add(*count)),
            ),
            devices: u32::try_from(counts.len()).unwrap_or(u32::MAX),
            tensor_split: (!counts.is_empty()).then(|| proportions(counts)),
            ..self.options.clone()
        };
        let estimate = estimate_with(self.facts, &options, self.companions)?;
        let answer = read(&estimate);
        if splits.len() >= Remembered::MOST_SPLITS {
            splits.remove(0);
        }
        splits.push((counts.to_vec(), estimate));
        Ok(answer)
    }
}

impl MemoryModel for Estimated<'_> {
    type Error = EstimateError;

    fn layer_bytes(&self) -> &[u64] {
        &self.layer_bytes
    }

    fn device_bytes(&self, counts: &[u32]) -> Result<Vec<u64>, EstimateError> {
        self.split(counts, |estimate| {
            estimate
                .devices
                .iter()
                .map(DeviceMemory::total_bytes)
                .collect()
        })
    }
}

/// Counts as proportions. llama.cpp compares `layer / all` with the running sums of these over
/// their total, both in single precision; whole numbers of layers make the two divisions the
/// same, so that the layers fall exactly as counted.
fn proportions(counts: &[u32]) -> Vec<f32> {
    #[expect(
        clippy::cast_precision_loss,
        reason = "numbers of layers, far below 2^24"
    )]
    counts.iter().map(|&count| count as f32).collect()
}

/// Decides where a model goes and says why; the order in which things are tried is that of
/// [`decide`]. `devices` and `tensor_split` of the options are not looked at: they are the
/// answer. `gpu_layers` is: so many layers are placed, and the rest stays on the host.
///
/// # Errors
/// [`PlaceError::Estimate`] where the model cannot be estimated with these options,
/// [`PlaceError::DoesNotFit`] where it fits nowhere that the policy allows.
pub fn place<G: Borrow<Gpu>>(
    facts: &ModelFacts,
    options: &EstimateOptions,
    companions: Companions<'_>,
    gpus: &[G],
    policy: &Policy,
    running: &[&Running],
) -> Result<Placement, PlaceError> {
    let remembered = &mut Remembered::default();
    place_again(
        facts, options, companions, remembered, gpus, policy, running,
    )
}

/// As [`place`], for a model and options that `remembered` has been handed to before, or new.
///
/// # Errors
/// As [`place`].
pub fn place_again<G: Borrow<Gpu>>(
    facts: &ModelFacts,
    options: &EstimateOptions,
    companions: Companions<'_>,
    remembered: &mut Remembered,
    gpus: &[G],
    policy: &Policy,
    running: &[&Running],
) -> Result<Placement, PlaceError> {
    let known = std::mem::take(remembered);
    let model = Estimated::remembering(facts, options, companions, known)?;
    let decision = decide(&model, options.gpu_layers, gpus, policy, running)?;
    let Some(decision) = decision else {
        *remembered = model.into_remembered();
        let refusal = refusal::refusal(facts, options, companions, gpus, policy, running)?;
        return Err(PlaceError::DoesNotFit(Box::new(refusal)));
    };
    let placed = placement(&model, &decision, gpus, policy, running)?;
    *remembered = model.into_remembered();
    Ok(placed)
}

pub(crate) fn placement<G: Borrow<Gpu>>(
    model: &Estimated<'_>,
    decision: &Decision,
    gpus: &[G],
    policy: &Policy,
    running: &[&Running],
) -> Result<Placement, EstimateError> {
    let counts: Vec<u32> = decision.shares.iter().map(|share| share.layers).collect();
    let gpu_layers = decision.gpu_layers();
    let devices: Vec<PlacedDevice> = decision
        .shares
        .iter()
        .filter_map(|share| {
            let gpu: &Gpu = gpus.get(share.gpu)?.borrow();
            Some(PlacedDevice {
                uuid: gpu.uuid.clone(),
                index: gpu.index,
                layers: share.layers,
                total_bytes: share.bytes,
            })
        })
        .collect();
    let all_layers = u32::try_from(model.layer_bytes().len()).unwrap_or(u32::MAX);
    let mode = match devices.len() {
        0 => Mode::Cpu,
        _ if gpu_layers < all_layers => Mode::Partial,
        1 => Mode::Single,
        _ => Mode::Multi,
    };
    let leaving = decision
        .evict
        .iter()
        .filter_map(|&place| running.get(place));
    Ok(Placement {
        mode,
        devices,
        gpu_layers,
        tensor_split: proportions(&counts),
        evict: leaving.map(|model| model.id.clone()).collect(),
        estimate: model.split(&counts, MemoryEstimate::clone)?,
        reason: explain::reason(decision, all_layers, gpus, policy, running),
    })
}
