//! Handing over between ranks that are threads: what arrives, how much is on its way, and what happens to messages that
//! are not as they should be.

use super::stream::IN_FLIGHT;
use super::*;
use crate::parcel::{CHUNK_BYTES, HEAD_BYTES, Parcel};
use crate::transport::Kind;
use crate::wait::Rest;
use anyhow::bail;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What is on its way from rank to rank, oldest first.
type Post = Arc<Mutex<HashMap<(usize, usize), VecDeque<Vec<u8>>>>>;

/// One rank of a run inside this process, that only sends and receives.
struct Local {
    rank: usize,
    size: usize,
    post: Post,
}

fn local_ranks(size: usize) -> Vec<Local> {
    let post = Post::default();
    (0..size)
        .map(|rank| Local {
            rank,
            size,
            post: Arc::clone(&post),
        })
        .collect()
}

impl Rest for Local {}

impl Transport for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn send(&mut self, to: usize, kind: Kind, bytes: Vec<u8>) -> Result<()> {
        assert_eq!(kind, Kind::Setup);
        assert!(bytes.len() <= HEAD_BYTES + CHUNK_BYTES);
        let mut post = self.post.lock().unwrap();
        let waiting = post.entry((self.rank, to)).or_default();
        waiting.push_back(bytes);
        let is_chunk = |bytes: &&Vec<u8>| bytes.len() > HEAD_BYTES + 32;
        assert!(waiting.iter().filter(is_chunk).count() <= IN_FLIGHT);
        Ok(())
    }

    fn try_receive(&mut self, from: usize, kind: Kind) -> Result<Option<Vec<u8>>> {
        assert_eq!(kind, Kind::Setup);
        let mut post = self.post.lock().unwrap();
        let waiting = post.get_mut(&(from, self.rank));
        Ok(waiting.and_then(VecDeque::pop_front))
    }

    fn share(&mut self, _: Vec<u8>) -> Result<()> {
        bail!("not while weights are handed over")
    }

    fn expect_shared(&mut self, _: usize) -> Result<()> {
        bail!("not while weights are handed over")
    }

    fn try_shared(&mut self) -> Result<Option<Vec<u8>>> {
        bail!("not while weights are handed over")
    }

    fn gather_all(&mut self, _: &[u8], _: Option<Duration>) -> Result<Vec<Vec<u8>>> {
        bail!("not while weights are handed over")
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

/// A checkpoint of `U8` vectors with these names and lengths, whose bytes are all different.
fn checkpoint(dir: &Path, lengths: &[(&str, usize)]) -> Checkpoint {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for &(name, length) in lengths {
        let begin = data.len();
        data.extend((0..length).map(|at| (at * 31 + at / 251 + begin) as u8));
        let entry = serde_json::json!({
            "dtype": "U8", "shape": [length], "data_offsets": [begin, data.len()]
        });
        header.insert(name.to_owned(), entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    let head = (header.len() as u64).to_le_bytes();
    let bytes = [&head[..], header.as_bytes(), &data].concat();
    std::fs::write(dir.join("model.safetensors"), bytes).unwrap();
    Checkpoint::open(dir).unwrap()
}

fn slice(checkpoint: &Checkpoint, names: &[&str]) -> Shard {
    Shard::new(checkpoint, names, "a configuration", "layers-0-0").unwrap()
}

#[test]
fn slices_arrive_whole_with_two_chunks_on_their_way_at_most() {
    let dir = tempfile::tempdir().unwrap();
    let lengths = [
        ("small", 3),
        ("none", 0),
        ("large", 3 * CHUNK_BYTES + 5),
        ("exact", CHUNK_BYTES),
    ];
    let source = checkpoint(dir.path(), &lengths);
    // The receivers know the checkpoint from its outline only.
    let told = serde_json::to_vec(&source.header_texts().unwrap()).unwrap();
    let slices = [&["large", "none"][..], &["small", "exact"]];
    let mut ranks = local_ranks(3);
    std::thread::scope(|scope| {
        let receivers: Vec<_> = ranks.split_off(1);
        for (mut rank, names) in receivers.into_iter().zip(slices) {
            let (told, source, dir) = (&told, &source, dir.path());
            scope.spawn(move || {
                let outline: crate::checkpoint::HeaderTexts = serde_json::from_slice(told).unwrap();
                let elsewhere = outline.into_checkpoint(dir).unwrap();
                assert_eq!(elsewhere.fingerprint(), source.fingerprint());
                assert!(elsewhere.open_tensor(names[0]).is_err());
                let (shard, cache) = (slice(&elsewhere, names), dir.join(names[0]));
                receive_slice(&mut rank, 0, &shard, &cache).unwrap();
                let received = shard.open(&cache).unwrap().unwrap();
                for name in names {
                    assert_eq!(bytes_of(&received, name), bytes_of(source, name), "{name}");
                }
            });
        }
        let wanted = slices.map(|names| slice(&source, names));
        let slices: Vec<_> = (1..).zip(wanted).collect();
        send_slices(&mut ranks[0], &source, &slices).unwrap();
    });
}

fn bytes_of(checkpoint: &Checkpoint, name: &str) -> Vec<u8> {
    let tensor = checkpoint.open_tensor(name).unwrap();
    let mut bytes = vec![0; tensor.bytes() as usize];
    tensor.read(&mut bytes).unwrap();
    bytes
}

/// What a receiver of the tensor `a`, four bytes long, makes of these messages.
fn receive(messages: &[Vec<u8>]) -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let source = checkpoint(dir.path(), &[("a", 4)]);
    let mut ranks = local_ranks(2);
    let sender = &mut ranks[0];
    for message in messages {
        sender.send(1, Kind::Setup, message.clone()).unwrap();
    }
    let (shard, cache) = (slice(&source, &["a"]), dir.path().join("cache"));
    let received = receive_slice(&mut ranks[1], 0, &shard, &cache);
    // Whole under its name, or not there at all.
    let files = std::fs::read_dir(&cache).unwrap().count();
    assert_eq!(files, usize::from(received.is_ok()));
    received
}

fn chunk(item: u32, offset: u64, bytes: &[u8]) -> Vec<u8> {
    let parcel = Parcel::Chunk {
        item,
        offset,
        bytes,
    };
    parcel.encode()
}

fn seal(item: u32, bytes: &[u8]) -> Vec<u8> {
    let parcel = Parcel::Seal {
        item,
        length: bytes.len() as u64,
        hash: blake3::hash(bytes).into(),
    };
    parcel.encode()
}

#[test]
fn messages_that_are_not_the_next_ones_are_errors_that_say_so() {
    let taken = Parcel::Taken { item: 0, offset: 0 }.encode();
    receive(&[chunk(0, 0, b"ab"), chunk(0, 2, b"cd"), seal(0, b"abcd")]).unwrap();
    for (messages, told) in [
        (
            vec![chunk(0, 0, b"abcd"), seal(0, b"abcx")],
            "hashes differ",
        ),
        (
            vec![chunk(0, 0, b"ab"), seal(0, b"ab")],
            "sent 2 bytes, expected 4",
        ),
        (vec![chunk(0, 0, b"ab"), seal(0, b"abcd")], "out of order"),
        (vec![chunk(0, 0, b"abcde")], "out of order"),
        (
            vec![chunk(0, 0, b"abc"), chunk(0, 3, b"de")],
            "out of order",
        ),
        (vec![chunk(0, 2, b"cd")], "out of order"),
        (vec![chunk(0, u64::MAX, b"ab")], "out of order"),
        (vec![chunk(1, 0, b"ab")], "out of order"),
        (vec![seal(1, b"")], "out of order"),
        (vec![taken], "out of order"),
        (vec![b"MXPS".to_vec()], "no part of a handover"),
        (vec![Vec::new()], "no part of a handover"),
    ] {
        let error = format!("{:#}", receive(&messages).unwrap_err());
        assert!(error.contains(told), "{told}: {error}");
        assert!(
            error.contains("tensor a") && error.contains("rank 0"),
            "{error}"
        );
    }
}

#[test]
fn an_answer_to_what_was_not_sent_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let source = checkpoint(dir.path(), &[("a", 4)]);
    for answer in [
        Parcel::Taken { item: 0, offset: 0 }.encode(),
        seal(0, b"abcd"),
        b"hello".to_vec(),
    ] {
        let mut ranks = local_ranks(2);
        ranks[1].send(0, Kind::Setup, answer).unwrap();
        let slices = [(1, slice(&source, &["a"]))];
        let error = send_slices(&mut ranks[0], &source, &slices).unwrap_err();
        assert!(format!("{error:#}").contains("rank 1"), "{error:#}");
    }
}

#[test]
fn a_weight_file_that_changed_is_not_handed_over() {
    let dir = tempfile::tempdir().unwrap();
    let source = checkpoint(dir.path(), &[("a", 4)]);
    let file = std::fs::File::open(dir.path().join("model.safetensors")).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    let slices = [(1, slice(&source, &["a"]))];
    let error = send_slices(&mut local_ranks(2)[0], &source, &slices).unwrap_err();
    assert!(
        error.to_string().contains("replaced or written to"),
        "{error}"
    );
    assert!(source.header_texts().is_err());
}
