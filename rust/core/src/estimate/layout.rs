//! Which device each layer goes to.

use super::options::EstimateOptions;

/// Where the layers of a model are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The device of each layer; `None` is the host.
    pub layers: Vec<Option<u32>>,
    /// The device of the output layer; `None` is the host.
    pub output: Option<u32>,
    /// How many devices there are.
    pub devices: u32,
}

impl Layout {
    pub(super) fn new(layer_count: u32, options: &EstimateOptions) -> Self {
        let split = options.tensor_split.as_deref();
        let mut layers = layer_devices(layer_count, options.gpu_layers, options.devices, split);
        let output = layers.pop().flatten();
        Self {
            layers,
            output,
            devices: options.devices,
        }
    }

    /// Layers of a device, the output layer counted; `None` counts the host's.
    pub fn count_on(&self, device: Option<u32>) -> u32 {
        let placed = self.layers.iter().chain([&self.output]);
        u32::try_from(placed.filter(|&&place| place == device).count()).unwrap_or(u32::MAX)
    }
}

/// The device of each layer and, last, of the output layer; `None` is the host.
///
/// The last `gpu_layers` layers go to devices, in device order, by the shares in `split`
/// (equal without). Source: `get_layer_buft_list` in `llama_model_base::load_tensors`
/// (llama-model.cpp), with its single-precision comparison.
#[allow(
    clippy::cast_precision_loss,
    reason = "llama.cpp compares in single precision"
)]
pub fn layer_devices(
    layer_count: u32,
    gpu_layers: Option<u32>,
    devices: u32,
    split: Option<&[f32]>,
) -> Vec<Option<u32>> {
    let all = layer_count.saturating_add(1);
    let offloaded = if devices == 0 {
        0
    } else {
        gpu_layers.unwrap_or(all).min(all)
    };
    let first = all.saturating_sub(offloaded);
    let bounds = cumulative_shares(devices, split);
    (0..all)
        .map(|layer| {
            let place = layer.checked_sub(first)? as f32 / offloaded as f32;
            let device = bounds.iter().position(|&bound| bound > place);
            let last = devices.checked_sub(1)?;
            Some(device.and_then(|d| u32::try_from(d).ok()).unwrap_or(last))
        })
        .collect()
}

/// Where the share of each device ends, from 0 to 1.
fn cumulative_shares(devices: u32, split: Option<&[f32]>) -> Vec<f32> {
    let mut sum = 0.0_f32;
    let mut bounds: Vec<f32> = (0..devices as usize)
        .map(|device| {
            sum += split.map_or(1.0, |shares| shares.get(device).copied().unwrap_or(0.0));
            sum
        })
        .collect();
    for bound in &mut bounds {
        *bound /= sum;
    }
    bounds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_layers_are_offloaded_first() {
        let places = layer_devices(4, Some(2), 1, None);
        assert_eq!(places, [None, None, None, Some(0), Some(0)]);
    }

    #[test]
    fn shares_divide_the_layers_in_device_order() {
        let places = layer_devices(3, None, 2, Some(&[3.0, 1.0]));
        assert_eq!(places, [Some(0), Some(0), Some(0), Some(1)]);
    }

    #[test]
    fn more_layers_than_there_are_means_all() {
        assert_eq!(
            layer_devices(2, Some(999), 1, None),
            layer_devices(2, None, 1, None)
        );
    }

    #[test]
    fn without_devices_everything_stays_on_the_host() {
        assert_eq!(layer_devices(2, None, 0, None), [None, None, None]);
    }
}
