//! What a GPU's `NVLink`s lead to.

use nvml_wrapper::Device;

/// `NVML_NVLINK_MAX_LINKS` of nvml.h.
const MOST_LINKS: u32 = 18;

/// The PCI addresses at the other ends of the links that are up, each once: other GPUs, or the switch
/// that joins several. Empty where there are none, or where the driver does not tell
/// (`nvmlDeviceGetNvLinkState`, `nvmlDeviceGetNvLinkRemotePciInfo_v2`).
pub(super) fn read(device: &Device<'_>) -> Vec<String> {
    let mut peers = Vec::new();
    for number in 0..MOST_LINKS {
        let link = device.link_wrapper_for(number);
        // A GPU without NVLink, or with fewer links, refuses the first that it lacks.
        let Ok(is_up) = link.is_active() else { break };
        if is_up && let Ok(remote) = link.remote_pci_info() {
            peers.push(remote.bus_id.to_ascii_uppercase());
        }
    }
    peers.sort_unstable();
    peers.dedup();
    peers
}
