//! Broken headers by the ten thousand: no panic, no hang, and never more than 64 MiB.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]
#![allow(unsafe_code, reason = "an allocator that counts")]

#[path = "support/gguf_bytes.rs"]
#[allow(dead_code, reason = "each test file uses a part of it")]
mod gguf_bytes;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use gguf_bytes::{GgufBytes, STRING, sample};
use llama_gpu_core::gguf::{Array, MAX_METADATA, MAX_TENSORS, Value, parse, read_header};

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// The counters are the process's: one test at a time looks at them.
static TURN: Mutex<()> = Mutex::new(());

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MOST_BYTES: usize = 64 << 20;

/// What `work` takes at its worst, beyond what was there before.
fn peak_of(work: impl FnOnce()) -> usize {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    work();
    PEAK.load(Ordering::Relaxed).saturating_sub(before)
}

/// Xorshift: the same run every time.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % bound as u64).unwrap()
    }
}

fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    const TELLING: [u64; 8] = [
        0,
        1,
        0xFF,
        0x7FFF_FFFF,
        0xFFFF_FFFF,
        1 << 40,
        i64::MAX as u64,
        u64::MAX,
    ];
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len());
        match random.below(4) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = u8::try_from(random.below(256)).unwrap(),
            2 => {
                let value = TELLING[random.below(TELLING.len())].to_le_bytes();
                let room = value.len().min(bytes.len() - at);
                bytes[at..at + room].copy_from_slice(&value[..room]);
            }
            _ if bytes.len() > 1 => bytes.truncate(at.max(1)),
            _ => {}
        }
    }
}

#[test]
fn a_hundred_thousand_broken_headers_end_in_a_header_or_a_refusal() {
    let _turn = TURN.lock().unwrap();
    let seeds = [
        sample(3, false).file(),
        sample(2, false).file(),
        sample(3, true).file(),
    ];
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let (mut good, mut refused) = (0_u32, 0_u32);
    for round in 0..100_000 {
        let mut bytes = seeds[round % seeds.len()].clone();
        mutate(&mut bytes, &mut random);
        let file_bytes = if random.below(4) == 0 {
            u64::MAX
        } else {
            bytes.len() as u64
        };
        let peak = peak_of(|| match parse(&bytes, file_bytes) {
            Ok(header) => {
                good += 1;
                let arrays = header
                    .metadata
                    .iter()
                    .filter_map(|(_, value)| value.as_array());
                let items = arrays
                    .filter_map(Array::items)
                    .map(|items| items.iter().count());
                assert!(items.sum::<usize>() <= bytes.len());
            }
            Err(error) => {
                refused += 1;
                assert!(!error.to_string().is_empty());
            }
        });
        assert!(peak < MOST_BYTES, "{peak} bytes for {} bytes", bytes.len());
    }
    assert!(
        good > 1_000 && refused > 10_000,
        "{good} good, {refused} refused"
    );
}

/// The largest of everything that is allowed, in one file, read twice over as two shards.
#[test]
fn the_largest_header_that_is_allowed_stays_within_its_bound() {
    let _turn = TURN.lock().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let write = |number: u16| {
        let mut file = GgufBytes::default()
            .raw("split.no", 2, &number.to_le_bytes())
            .raw("split.count", 2, &2_u16.to_le_bytes());
        let text = "x".repeat(400);
        for key in 0..MAX_METADATA - 2 {
            file = file.string(&format!("key.{key}"), &text);
        }
        for index in 0..MAX_TENSORS / 2 {
            file = file.tensor(format!("{number}.{index:061}"), &[1], 0, index * 32);
        }
        let bytes = file.data(usize::try_from(MAX_TENSORS).unwrap() * 16).file();
        fs::write(
            folder
                .path()
                .join(format!("m-{:05}-of-00002.gguf", number + 1)),
            bytes,
        )
        .unwrap();
    };
    write(0);
    write(1);
    let peak = peak_of(|| {
        let header = read_header(&folder.path().join("m-00002-of-00002.gguf")).unwrap();
        assert_eq!(header.tensors.len() as u64, MAX_TENSORS);
    });
    assert!(peak < MOST_BYTES, "{peak} bytes");
}

/// As many empty strings as a list may have: their places must not outgrow the bound.
#[test]
fn the_largest_list_that_is_handed_out_stays_within_its_bound() {
    let _turn = TURN.lock().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("list.gguf");
    let count = 4_u64 << 20;
    let items = vec![0; usize::try_from(count).unwrap() * 8];
    fs::write(
        &path,
        GgufBytes::default()
            .array("k", STRING, count, &items)
            .file(),
    )
    .unwrap();
    drop(items);
    let peak = peak_of(|| {
        let header = read_header(&path).unwrap();
        let list = header
            .read_array(header.metadata.array("k").unwrap())
            .unwrap();
        assert_eq!(list.len() as u64, count);
        assert_eq!(list.get(list.len() - 1), Some(Value::String("".into())));
    });
    assert!(peak < MOST_BYTES, "{peak} bytes");
}
