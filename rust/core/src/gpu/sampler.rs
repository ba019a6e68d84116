//! The thread that owns NVML: it starts it, makes every call, and shuts it down.
//!
//! A call into the driver can hang for good, so nobody waits for this thread without a deadline, and
//! nothing but this thread may drop its session: unloading the library under a hanging call would let
//! the call return into nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{Receiver, SendError, Sender, channel};
use std::{io, thread};

use nvml_wrapper::Nvml;

use super::Gpu;
use super::failure::Failure;
use super::host::Host;
use super::library::Library;
use super::processes::ProcessCalls;
use super::reading::{Identity, Reader};

/// No machine has more; a driver that says so is not believed.
const MOST_GPUS: u32 = 256;

/// One pass over all GPUs.
#[derive(Debug)]
pub(super) struct Order {
    /// The library to ask; another one than before starts a new session.
    pub(super) library: Library,
    /// Start a new session in any case: GPUs that came back, and changed MIG devices, need one.
    pub(super) restart: bool,
    /// Ask GPUs that sleep, too.
    pub(super) wake: bool,
    /// GPUs to leave out, because another thread hangs in a call on them.
    pub(super) skip: BTreeSet<u32>,
    /// What is known of the GPUs from before.
    pub(super) known: BTreeMap<u32, Identity>,
}

/// What comes back, in this order: `Started` or `NotStarted` or `AllAsleep`; then for each GPU
/// `Reading` and `Read`, or `Asleep`; then `Finished`.
#[derive(Debug)]
pub(super) enum Report {
    Started { driver_version: Option<String> },
    NotStarted(String),
    AllAsleep,
    Reading(u32),
    Read(u32, Vec<Gpu>),
    Asleep(u32),
    Finished,
}

/// The other end of the thread. Dropping it ends the thread, once it returns from its call.
#[derive(Debug)]
pub(super) struct Sampler {
    pub(super) orders: Sender<Order>,
    pub(super) reports: Receiver<Report>,
}

impl Sampler {
    pub(super) fn spawn(host: Host) -> io::Result<Self> {
        let (orders, inbox) = channel();
        let (outbox, reports) = channel();
        thread::Builder::new()
            .name("llama-gpu-nvml".to_owned())
            .spawn(move || work(&host, &inbox, &outbox))?;
        Ok(Self { orders, reports })
    }
}

struct Session {
    nvml: Nvml,
    library: Library,
    driver_version: Option<String>,
}

fn work(host: &Host, orders: &Receiver<Order>, reports: &Sender<Report>) {
    let mut session = None;
    for order in orders {
        if serve(&order, &mut session, host, reports).is_err() {
            return; // nobody listens any more
        }
    }
}

fn serve(
    order: &Order,
    session: &mut Option<Session>,
    host: &Host,
    reports: &Sender<Report>,
) -> Result<(), SendError<Report>> {
    if session
        .as_ref()
        .is_some_and(|known| order.restart || known.library != order.library)
    {
        *session = None;
    }
    let known = match session.take() {
        Some(known) => known,
        None if !order.wake && host.all_gpus_asleep() => return reports.send(Report::AllAsleep),
        None => match order.library.start(host) {
            Ok(nvml) => Session {
                driver_version: nvml.sys_driver_version().ok(),
                library: order.library.clone(),
                nvml,
            },
            Err(words) => return reports.send(Report::NotStarted(words)),
        },
    };
    let count = match known.nvml.device_count() {
        Ok(count) => count.min(MOST_GPUS),
        Err(error) => {
            let words = Failure::from(error)
                .starting("the driver library", host.kernel_module().as_deref());
            drop(known); // a session that cannot count is broken: the next order starts another
            return reports.send(Report::NotStarted(words));
        }
    };
    reports.send(Report::Started {
        driver_version: known.driver_version.clone(),
    })?;
    let reader = Reader {
        nvml: &known.nvml,
        host,
        process_calls: ProcessCalls::for_driver(known.driver_version.as_deref()),
    };
    let unknown = Identity::default();
    for index in (0..count).filter(|index| !order.skip.contains(index)) {
        let identity = order.known.get(&index).unwrap_or(&unknown);
        let sleeps = |address: &String| host.is_asleep(address);
        if !order.wake && identity.pci_bus_id.as_ref().is_some_and(sleeps) {
            reports.send(Report::Asleep(index))?;
            continue;
        }
        reports.send(Report::Reading(index))?;
        reports.send(Report::Read(index, reader.read(index, identity)))?;
    }
    *session = Some(known);
    reports.send(Report::Finished)
}
