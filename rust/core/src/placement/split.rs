//! Which layers go to which device, once the devices are known.
//!
//! llama.cpp hands out layers in one run per device, in device order, the output layer last
//! (src/llama-model.cpp, `load_tensors`). So a split is a list of counts, and the question
//! "does it fit" is answered by filling one device after the other.

/// The largest number of devices that one llama.cpp process uses (`GGML_CUDA_MAX_DEVICES`).
pub(crate) const MAX_DEVICES: usize = 16;

/// So many layers, dealt out as evenly as they go.
pub(crate) fn even_split(layers: u32, devices: usize) -> Vec<u32> {
    let mut left = layers;
    (1..=u32::try_from(devices).unwrap_or(u32::MAX))
        .rev()
        .map(|devices_left| {
            let part = left.checked_div(devices_left).unwrap_or(0);
            left = left.saturating_sub(part);
            part
        })
        .collect()
}

/// The bytes of every layer as running sums, so that any run of layers costs two look-ups.
///
/// The sums are wider than the bytes: a sum that wrapped or stuck at its end would let a
/// model of absurd size pass for one that fits.
#[derive(Debug, Clone)]
pub(crate) struct Layers {
    sums: Vec<u128>,
}

impl Layers {
    /// `bytes` of each layer in order, the output layer last.
    pub(crate) fn new(bytes: &[u64]) -> Self {
        let mut sums = Vec::with_capacity(bytes.len().saturating_add(1));
        let mut sum = 0_u128;
        sums.push(sum);
        for &layer in bytes {
            sum = sum.saturating_add(u128::from(layer));
            sums.push(sum);
        }
        Self { sums }
    }

    /// The number of layers, the output layer counted.
    pub(crate) fn count(&self) -> usize {
        self.sums.len().saturating_sub(1)
    }

    /// The bytes of the layers `from..to`.
    pub(crate) fn between(&self, from: usize, to: usize) -> u128 {
        self.sum(to).saturating_sub(self.sum(from))
    }

    /// The furthest `to` such that the layers `from..to` take no more than `bytes`.
    fn reach(&self, from: usize, bytes: u64) -> usize {
        let limit = self.sum(from).saturating_add(u128::from(bytes));
        let rest = self.sums.get(from.saturating_add(1)..).unwrap_or_default();
        from.saturating_add(rest.partition_point(|&sum| sum <= limit))
    }

    fn sum(&self, end: usize) -> u128 {
        self.sums
            .get(end)
            .or(self.sums.last())
            .copied()
            .unwrap_or_default()
    }
}

/// The last layers of a model over a chain of devices: what is asked of a set of GPUs.
#[derive(Debug, Clone)]
pub(crate) struct Chain<'a> {
    pub(crate) layers: &'a Layers,
    /// The first layer that goes to a device; those before it stay on the host.
    pub(crate) start: usize,
    /// What each device of the chain needs besides its layers: compute buffers and overhead.
    pub(crate) fixed: Vec<u64>,
}

impl Chain<'_> {
    /// How many devices the chain has.
    pub(crate) fn devices(&self) -> usize {
        self.fixed.len()
    }

    /// What all devices need together.
    pub(crate) fn total(&self) -> u128 {
        let fixed: u128 = self.fixed.iter().map(|&bytes| u128::from(bytes)).sum();
        self.layers
            .between(self.start, self.layers.count())
            .saturating_add(fixed)
    }

    /// Raises what the devices need besides their layers to what an exact estimate of a split
    /// says.
    pub(crate) fn learn(&mut self, counts: &[u32], device_bytes: &[u64]) {
        let mut from = self.start;
        for (fixed, (&count, &bytes)) in self.fixed.iter_mut().zip(counts.iter().zip(device_bytes))
        {
            let to = from.saturating_add(usize::try_from(count).unwrap_or(usize::MAX));
            let besides = u128::from(bytes).saturating_sub(self.layers.between(from, to));
            *fixed = (*fixed).max(u64::try_from(besides).unwrap_or(u64::MAX));
            from = to;
        }
    }

    /// How far the device at `place` gets from layer `from` with `budget` bytes, or `None` if
    /// it cannot hold a single layer, which would make it no device of the chain.
    fn step(&self, place: usize, from: usize, budget: u64) -> Option<usize> {
        let fixed = *self.fixed.get(place)?;
        let after_this = self.devices().saturating_sub(place).saturating_sub(1);
        let last = self.layers.count().saturating_sub(after_this);
        let to = self
            .layers
            .reach(from, budget.checked_sub(fixed)?)
            .min(last);
        (to > from).then_some(to)
    }

    /// Whether devices with these budgets, in this order, hold all the layers.
    pub(crate) fn fits(&self, budgets: &[u64]) -> bool {
        self.ends_when_filled(budgets, 0) == Some(self.layers.count())
    }

    fn ends_when_filled(&self, budgets: &[u64], margin: u64) -> Option<usize> {
        let mut at = self.start;
        for (place, budget) in budgets.iter().enumerate() {
            at = self.step(place, at, budget.checked_sub(margin)?)?;
        }
        Some(at)
    }

    /// Fills each device in turn to its budget; `None` if the layers do not all fit.
    pub(crate) fn filled(&self, budgets: &[u64], margin: u64) -> Option<Vec<u32>> {
        let mut at = self.start;
        let mut counts = Vec::with_capacity(budgets.len());
        for (place, budget) in budgets.iter().enumerate() {
            let to = self.step(place, at, budget.checked_sub(margin)?)?;
            counts.push(u32::try_from(to.saturating_sub(at)).ok()?);
            at = to;
        }
        (at == self.layers.count()).then_some(counts)
    }

    /// The split whose tightest device keeps the most bytes free.
    pub(crate) fn balanced(&self, budgets: &[u64]) -> Option<Vec<u32>> {
        const CLOSE_ENOUGH: u64 = 16 << 20;
        if !self.fits(budgets) {
            return None;
        }
        let (mut fits, mut fails) = (0_u64, budgets.iter().copied().min()?.saturating_add(1));
        while fails.saturating_sub(fits) > CLOSE_ENOUGH {
            let margin = fits.midpoint(fails);
            if self.ends_when_filled(budgets, margin) == Some(self.layers.count()) {
                fits = margin;
            } else {
                fails = margin;
            }
        }
        self.filled(budgets, fits)
    }

    /// As [`Self::filled`], each device given as many bytes more than its budget as it takes, to
    /// within `precision`.
    pub(crate) fn filled_with_least_more(
        &self,
        budgets: &[u64],
        precision: u64,
    ) -> Option<Vec<u32>> {
        let with = |more: u64| -> Vec<u64> {
            budgets
                .iter()
                .map(|budget| budget.saturating_add(more))
                .collect()
        };
        let (mut fails, mut fits) = (0, u64::try_from(self.total()).unwrap_or(u64::MAX));
        while fits.saturating_sub(fails) > precision {
            let more = fails.midpoint(fits);
            if self.fits(&with(more)) {
                fits = more;
            } else {
                fails = more;
            }
        }
        self.filled(&with(fits), 0)
    }

    /// Finds devices among `budgets` (already in device order) that hold all the layers.
    ///
    /// Exact: `reached[k]` is the furthest layer that any `k` of the devices seen so far get
    /// to, and getting further with the first `k` never makes the rest worse.
    pub(crate) fn any_set(&self, budgets: &[u64]) -> Option<Vec<usize>> {
        let devices = self.devices();
        if devices == 0 || devices > MAX_DEVICES || budgets.len() < devices {
            return None;
        }
        let mut reached = [(self.start, [0_usize; MAX_DEVICES]); MAX_DEVICES];
        let mut seen = 0_usize;
        for (device, &budget) in budgets.iter().enumerate() {
            for place in (0..devices.min(seen.saturating_add(1))).rev() {
                let (from, mut path) = match place.checked_sub(1) {
                    None => (self.start, [0; MAX_DEVICES]),
                    Some(before) => *reached.get(before)?,
                };
                let Some(to) = self.step(place, from, budget) else {
                    continue;
                };
                *path.get_mut(place)? = device;
                if place.saturating_add(1) == devices {
                    if to == self.layers.count() {
                        return Some(path.into_iter().take(devices).collect());
                    }
                    continue;
                }
                let best = reached.get_mut(place)?;
                if to > best.0 {
                    *best = (to, path);
                }
                seen = seen.max(place.saturating_add(1));
            }
        }
        None
    }
}
