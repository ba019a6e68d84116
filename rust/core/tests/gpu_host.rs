//! What the monitor takes from the operating system: sleeping GPUs, shared memory, the kernel module.
//! The driver is the fake library of the Python tests, compiled here; the system is a folder.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
#![cfg(target_os = "linux")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use llama_gpu_core::gpu::{GpuHealth, Host, Library, Monitor, MonitorOptions};

const GIB: u64 = 1 << 30;
const ADDRESS: &str = "0000:01:00.0";

/// A machine with a fake driver, below a folder that goes when the test ends.
struct Machine {
    root: PathBuf,
}

impl Machine {
    fn new(name: &str) -> Self {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(&root).unwrap();
        fs::copy(compiled(), root.join("libnvidia-ml.so.1")).unwrap();
        Self { root }
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        // In one step: the monitor may be reading.
        let fresh = path.with_extension("new");
        fs::write(&fresh, text).unwrap();
        fs::rename(fresh, path).unwrap();
    }

    fn gpu(&self, lines: &str) {
        let journal = self.root.join("journal");
        let head = format!(
            "driver 580.95.05\nnvml 13.580\njournal {}\n",
            journal.display()
        );
        let gpu = "[gpu]\nuuid GPU-a\npci 00000000:01:00.0\ncapability 8 9\n";
        self.write("nvml.state", &format!("{head}{gpu}{lines}"));
    }

    fn runtime_status(&self, status: &str) {
        let device = format!("sys/bus/pci/devices/{ADDRESS}");
        self.write(&format!("{device}/vendor"), "0x10de\n");
        self.write(&format!("{device}/class"), "0x030000\n");
        self.write(
            &format!("{device}/power/runtime_status"),
            &format!("{status}\n"),
        );
    }

    fn calls(&self) -> usize {
        fs::read_to_string(self.root.join("journal")).map_or(0, |text| text.lines().count())
    }

    fn monitor(&self, interval: Option<Duration>) -> Monitor {
        Monitor::start(MonitorOptions {
            interval,
            library: Library::Named(self.root.join("libnvidia-ml.so.1")),
            host: Host::at(&self.root),
            ..MonitorOptions::default()
        })
    }
}

/// The fake driver, compiled once; each copy reads the state file beside it.
fn compiled() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/support/fake_nvml");
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libfake_nvml.so");
        let done = Command::new("cc")
            .args(["-O1", "-shared", "-fPIC", "-o"])
            .arg(&library)
            .args([sources.join("nvml.c"), sources.join("state.c")])
            .status()
            .unwrap();
        assert!(done.success());
        library
    })
}

fn until(condition: impl Fn() -> bool) {
    let started = std::time::Instant::now();
    while !condition() {
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "it did not come to hold"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn watching_does_not_wake_a_sleeping_gpu_and_asking_does() {
    let machine = Machine::new("asleep");
    machine.gpu("name NVIDIA Laptop\nmemory 8589934592 0 8589934592 0\n");
    machine.runtime_status("suspended");
    let monitor = machine.monitor(Some(Duration::from_millis(5)));
    until(|| monitor.reading().age.is_some());
    let asleep = monitor.reading().snapshot;
    assert!(asleep.gpus.is_empty());
    assert!(asleep.error.unwrap().contains("is asleep"));
    assert_eq!(machine.calls(), 0);

    let woken = monitor.refresh().snapshot;
    assert_eq!(woken.gpus[0].free_bytes, Some(8 * GIB));
    assert_eq!(woken.error, None);
}

#[test]
fn a_gpu_that_falls_asleep_keeps_its_values_and_is_left_alone() {
    let machine = Machine::new("falls_asleep");
    machine.gpu("memory 8589934592 0 8589934592 0\n");
    machine.runtime_status("active");
    let monitor = machine.monitor(Some(Duration::from_millis(5)));
    until(|| monitor.reading().snapshot.gpus.len() == 1);
    machine.runtime_status("suspended");
    machine.gpu("memory 8589934592 0 1 8589934591\n");
    let reads_of_memory = || {
        let journal = fs::read_to_string(machine.root.join("journal")).unwrap();
        journal.matches("nvmlDeviceGetMemoryInfo_v2").count()
    };
    let passes = || {
        let journal = fs::read_to_string(machine.root.join("journal")).unwrap();
        journal.matches("nvmlDeviceGetCount_v2").count()
    };
    // A pass may have been under way when it fell asleep; those after it leave the GPU alone.
    let under_way = passes();
    until(|| passes() > under_way + 1);
    let (reads, later) = (reads_of_memory(), passes());
    until(|| passes() > later + 3);
    assert_eq!(reads_of_memory(), reads);
    let reading = monitor.reading();
    assert_eq!(reading.snapshot.gpus[0].health, GpuHealth::Ok);
    assert_eq!(reading.snapshot.gpus[0].total_bytes, Some(8 * GIB));
    assert!(reading.ages["GPU-a"] > Duration::ZERO);
}

#[test]
fn shared_memory_is_what_the_system_has_available_and_not_what_is_free() {
    let machine = Machine::new("shared");
    machine.gpu("name NVIDIA GB10\nprocess compute 4 1073741824\n");
    machine.write(
        "proc/meminfo",
        "MemTotal: 125829120 kB\nMemFree: 3145728 kB\nMemAvailable: 117440512 kB\n",
    );
    let gpu = &machine.monitor(None).refresh().snapshot.gpus[0];
    assert!(gpu.unified);
    assert_eq!(gpu.total_bytes, Some(120 * GIB));
    assert_eq!(gpu.free_bytes, Some(112 * GIB));
    assert_eq!(gpu.used_bytes, Some(GIB));
    assert_eq!(gpu.health, GpuHealth::Ok);
}

#[test]
fn shared_memory_is_no_more_than_the_control_group_allows() {
    let machine = Machine::new("control_group");
    machine.gpu("name NVIDIA Thor\n");
    machine.write(
        "proc/meminfo",
        "MemTotal: 125829120 kB\nMemAvailable: 117440512 kB\n",
    );
    machine.write("sys/fs/cgroup/memory.max", &format!("{}\n", 16 * GIB));
    machine.write("sys/fs/cgroup/memory.current", &format!("{}\n", 6 * GIB));
    let gpu = &machine.monitor(None).refresh().snapshot.gpus[0];
    assert_eq!(
        (gpu.total_bytes, gpu.free_bytes),
        (Some(16 * GIB), Some(10 * GIB))
    );
}

#[test]
fn a_jetson_is_known_by_its_device_tree() {
    let machine = Machine::new("jetson");
    machine.gpu("name nvgpu\n");
    machine.write(
        "proc/meminfo",
        "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n",
    );
    machine.write(
        "proc/device-tree/compatible",
        "nvidia,p3701-0000\0nvidia,tegra234\0",
    );
    let gpu = &machine.monitor(None).refresh().snapshot.gpus[0];
    assert!(gpu.unified);
    assert_eq!(gpu.free_bytes, Some(4 * GIB));
}

#[test]
fn memory_that_the_operating_system_manages_is_free_where_it_only_caches_files() {
    let machine = Machine::new("numa");
    machine.gpu("name NVIDIA GH200 480GB\nmemory 103079215104 0 1073741824 102005473280\nnuma 1\n");
    let memory = || {
        let gpu = machine.monitor(None).refresh().snapshot.gpus[0].clone();
        assert!(!gpu.unified);
        (gpu.free_bytes, gpu.used_bytes)
    };
    let node = |number: u32, total_gib: u64, free_gib: u64| {
        let kib = |gib: u64| gib << 20;
        machine.write(
            &format!("sys/devices/system/node/node{number}/meminfo"),
            &format!(
                "Node {number} MemTotal: {} kB\nNode {number} MemFree: {} kB\n\
                 Node {number} Active(file): {} kB\nNode {number} Inactive(file): {} kB\n",
                kib(total_gib),
                kib(free_gib),
                kib(2),
                kib(30)
            ),
        );
    };
    let as_told = (Some(GIB), Some(95 * GIB));
    assert_eq!(memory(), as_told);
    node(1, 96, 40);
    assert_eq!(memory(), (Some(72 * GIB), Some(24 * GIB)));
    node(1, 480, 40); // the CPU's own node: not this GPU's memory
    assert_eq!(memory(), as_told);
}

#[test]
fn a_driver_that_was_updated_names_the_version_that_still_runs() {
    let machine = Machine::new("updated");
    machine.write("nvml.state", "driver 580.95.05\nerror nvmlInit_v2 18\n");
    machine.write(
        "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10  Thu Jan 23 06:36:25 UTC 2025\n\
         GCC version:  gcc version 13.2.0\n",
    );
    let error = machine.monitor(None).refresh().snapshot.error.unwrap();
    assert!(
        error.contains("kernel module of version 570.86.10"),
        "{error}"
    );
}

#[test]
fn a_lost_gpu_makes_the_monitor_start_a_new_session_at_intervals() {
    let machine = Machine::new("renewal");
    machine.gpu("memory 8589934592 0 8589934592 0\nerror * 15\n");
    let monitor = Monitor::start(MonitorOptions {
        interval: Some(Duration::from_millis(5)),
        renewal: Duration::from_millis(20),
        library: Library::Named(machine.root.join("libnvidia-ml.so.1")),
        host: Host::at(&machine.root),
        ..MonitorOptions::default()
    });
    let starts = || {
        let journal = fs::read_to_string(machine.root.join("journal")).unwrap_or_default();
        journal.matches("nvmlInit_v2").count()
    };
    until(|| starts() >= 3);
    machine.gpu("memory 8589934592 0 8589934592 0\n");
    until(|| {
        monitor
            .reading()
            .snapshot
            .gpus
            .iter()
            .any(|gpu| gpu.health == GpuHealth::Ok)
    });
    assert!(monitor.close());
}

#[test]
fn nvml_is_closed_when_nobody_asked_for_a_while() {
    let machine = Machine::new("linger");
    machine.gpu("memory 8589934592 0 8589934592 0\n");
    let monitor = Monitor::start(MonitorOptions {
        interval: None,
        linger: Duration::from_millis(20),
        library: Library::Named(machine.root.join("libnvidia-ml.so.1")),
        host: Host::at(&machine.root),
        ..MonitorOptions::default()
    });
    assert_eq!(monitor.refresh().snapshot.gpus.len(), 1);
    until(|| {
        fs::read_to_string(machine.root.join("journal"))
            .unwrap()
            .contains("nvmlShutdown")
    });
    assert_eq!(monitor.refresh().snapshot.gpus.len(), 1);
}

#[test]
fn only_in_the_first_pid_namespace_are_process_ids_the_drivers() {
    for (name, inode, expected) in [
        ("host", 4_026_531_836_u64, true),
        ("container", 4_026_532_401, false),
    ] {
        let machine = Machine::new(name);
        fs::create_dir_all(machine.root.join("proc/self/ns")).unwrap();
        std::os::unix::fs::symlink(
            format!("pid:[{inode}]"),
            machine.root.join("proc/self/ns/pid"),
        )
        .unwrap();
        assert_eq!(Host::at(&machine.root).has_host_pids(), expected);
    }
    assert!(!Host::at("/nowhere").has_host_pids());
}
