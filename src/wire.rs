//! What ranks tell each other, as bytes: the [`Step`] that travels down the pipeline ahead of its
//! activations, and the [`Sampled`] tokens that the last rank shares with all. Pure.
//!
//! Everything is little-endian. A frame that another version, another program or a bug sent is an
//! error here, before anything acts on it: sizes are checked against the bytes that are there.

use std::mem::size_of;

/// Raised when a byte of the format, or of [`crate::parcel`]'s, changes; ranks compare it before they load anything.
pub const PROTOCOL_VERSION: u16 = 6;

const MAGIC: [u8; 4] = *b"MXPS";
const KIND_STEP: u8 = 1;
const KIND_END: u8 = 2;
const KIND_LOOKUP: u8 = 3;
const KIND_WAKE: u8 = 4;
const UPKEEP_RELEASE: u8 = 1;
const UPKEEP_FORK: u8 = 2;
/// Bytes of the shortest upkeep.
const UPKEEP_BYTES: usize = 5;

/// Bytes of one token's bias.
const BIAS_BYTES: usize = 8;

/// Why a frame was refused.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum WireError {
    /// The frame is shorter than what it announces.
    #[error("frame is cut off at byte {at} of {length}")]
    Short {
        /// Where the next field would begin.
        at: usize,
        /// Bytes there are.
        length: usize,
    },
    /// The frame is not one of ours.
    #[error("frame does not begin as expected: {0}")]
    Foreign(String),
    /// Two parts of the frame contradict each other.
    #[error("frame contradicts itself: {0}")]
    Inconsistent(String),
}

/// How the last rank picks a token. Stands in the step, so that the last rank keeps no state.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleParams {
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// Smallest set of tokens whose probabilities sum to this; 1 is off.
    pub top_p: f32,
    /// Most likely tokens to choose from; 0 is off.
    pub top_k: u32,
    /// Share of the best token's probability that a token must have; 0 is off.
    pub min_p: f32,
    /// Divides the positive logits of tokens already in the sequence, multiplies the negative; 1 is off.
    pub repetition_penalty: f32,
    /// Taken off the logit of every token that is in the answer; 0 is off.
    pub presence_penalty: f32,
    /// Taken off the logit of a token for each time that it is in the answer; 0 is off.
    pub frequency_penalty: f32,
    /// Tokens of the prompt: where the answer begins.
    pub prompt_tokens: u32,
    /// Added to the logits of these tokens; ordered by token, each once.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the random numbers of this sequence.
    pub seed: u64,
    /// `None`: no logprobs. `Some(k)`: the token's own, and those of the `k` most likely.
    pub logprobs: Option<u8>,
}

impl SampleParams {
    /// The most likely token, nothing else asked for.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        prompt_tokens: 0,
        logit_bias: Vec::new(),
        seed: 0,
        logprobs: None,
    };

    /// The token of the largest logit is all that is asked for.
    pub fn takes_the_best(&self) -> bool {
        self.temperature == 0.0
            && self.repetition_penalty == 1.0
            && self.presence_penalty == 0.0
            && self.frequency_penalty == 0.0
            && self.logit_bias.is_empty()
            && self.logprobs.is_none()
    }
}

/// Tokens of one sequence that a step computes.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Which cache holds the sequence.
    pub slot: u32,
    /// Position of the first token in the sequence; the cache is cut back to it.
    pub start: u32,
    /// The tokens, at least one.
    pub tokens: Vec<u32>,
    /// How to sample after the last token; `None` while a prompt is still being read.
    pub sample: Option<SampleParams>,
}

/// A sequence that begins as another one did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fork {
    /// The slot whose cache holds the tokens.
    pub from: u32,
    /// The slot of the new sequence.
    pub to: u32,
    /// Tokens that it takes over.
    pub tokens: u32,
}

/// What happens to a cache before a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upkeep {
    /// A slot is dropped.
    Release(u32),
    /// A slot begins as another.
    Fork(Fork),
}

/// What a rank has spent its time on, in microseconds since its loop began, and what it has sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Computing.
    pub busy_us: u64,
    /// Waiting for another rank.
    pub wait_us: u64,
    /// Handing messages to MPI.
    pub wire_us: u64,
    /// Bytes handed to MPI.
    pub sent_bytes: u64,
}

/// What every rank computes next.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Step {
    /// Counts up from 0.
    pub number: u64,
    /// Steps on their way when this one sets out, itself included; at least 1.
    pub in_flight: u16,
    /// What happens to caches before the step, in this order.
    pub upkeep: Vec<Upkeep>,
    /// If the first rank wants to know: the loads of the ranks that the step has passed.
    pub loads: Option<Vec<Load>>,
    /// The sequences in the step, in the order of their rows.
    pub entries: Vec<Entry>,
}

/// One frame from rank to rank.
#[derive(Debug, Clone, PartialEq)]
pub enum Frame {
    /// Compute this; the activations follow, `[rows, hidden]`.
    Step(Step),
    /// No more steps.
    End,
    /// To the last rank, where it holds the embedding table: the rows of these tokens, please.
    Lookup(Vec<u32>),
    /// To every rank: steps come soon, look for them often.
    Wake,
}

impl Step {
    /// Rows of the step's activations.
    pub fn row_count(&self) -> usize {
        self.entries.iter().map(|entry| entry.tokens.len()).sum()
    }

    /// The tokens of all entries, row by row.
    pub fn tokens(&self) -> Vec<u32> {
        let entries = self.entries.iter();
        entries
            .flat_map(|entry| entry.tokens.iter().copied())
            .collect()
    }

    /// Entries that are sampled from.
    pub fn sampled(&self) -> impl Iterator<Item = (&Entry, &SampleParams)> {
        self.entries
            .iter()
            .filter_map(|entry| entry.sample.as_ref().map(|sample| (entry, sample)))
    }

    /// Bytes of the [`Sampled`] that answers this step in a run of so many ranks; every rank can tell them from the
    /// step.
    pub fn sampled_bytes(&self, ranks: usize) -> usize {
        let records: usize = self
            .sampled()
            .map(|(_, sample)| record_bytes(sample.logprobs))
            .sum();
        let loads = self.loads.as_ref().map_or(0, |_| ranks * LOAD_BYTES);
        size_of::<u64>() + records + loads
    }
}

/// Encodes a frame's header; the activations are appended to it.
pub fn encode(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(64);
    bytes.extend(MAGIC);
    bytes.extend(PROTOCOL_VERSION.to_le_bytes());
    match frame {
        Frame::End => bytes.push(KIND_END),
        Frame::Wake => bytes.push(KIND_WAKE),
        Frame::Lookup(tokens) => {
            bytes.push(KIND_LOOKUP);
            encode_tokens(tokens, &mut bytes);
        }
        Frame::Step(step) => {
            bytes.push(KIND_STEP);
            bytes.extend(step.number.to_le_bytes());
            bytes.extend(step.in_flight.to_le_bytes());
            bytes.extend((step.upkeep.len() as u32).to_le_bytes());
            for upkeep in &step.upkeep {
                encode_upkeep(upkeep, &mut bytes);
            }
            bytes.push(step.loads.is_some() as u8);
            if let Some(loads) = &step.loads {
                bytes.extend((loads.len() as u32).to_le_bytes());
                encode_loads(loads, &mut bytes);
            }
            bytes.extend((step.entries.len() as u32).to_le_bytes());
            for entry in &step.entries {
                encode_entry(entry, &mut bytes);
            }
        }
    }
    bytes
}

fn encode_tokens(tokens: &[u32], bytes: &mut Vec<u8>) {
    bytes.extend((tokens.len() as u32).to_le_bytes());
    for token in tokens {
        bytes.extend(token.to_le_bytes());
    }
}

fn encode_upkeep(upkeep: &Upkeep, bytes: &mut Vec<u8>) {
    match upkeep {
        Upkeep::Release(slot) => {
            bytes.push(UPKEEP_RELEASE);
            bytes.extend(slot.to_le_bytes());
        }
        Upkeep::Fork(fork) => {
            bytes.push(UPKEEP_FORK);
            for field in [fork.from, fork.to, fork.tokens] {
                bytes.extend(field.to_le_bytes());
            }
        }
    }
}

fn encode_loads(loads: &[Load], bytes: &mut Vec<u8>) {
    for load in loads {
        for field in [load.busy_us, load.wait_us, load.wire_us, load.sent_bytes] {
            bytes.extend(field.to_le_bytes());
        }
    }
}

fn encode_entry(entry: &Entry, bytes: &mut Vec<u8>) {
    bytes.extend(entry.slot.to_le_bytes());
    bytes.extend(entry.start.to_le_bytes());
    encode_tokens(&entry.tokens, bytes);
    bytes.push(entry.sample.is_some() as u8);
    if let Some(sample) = &entry.sample {
        bytes.extend(sample.temperature.to_le_bytes());
        bytes.extend(sample.top_p.to_le_bytes());
        bytes.extend(sample.top_k.to_le_bytes());
        bytes.extend(sample.min_p.to_le_bytes());
        bytes.extend(sample.repetition_penalty.to_le_bytes());
        bytes.extend(sample.presence_penalty.to_le_bytes());
        bytes.extend(sample.frequency_penalty.to_le_bytes());
        bytes.extend(sample.prompt_tokens.to_le_bytes());
        bytes.extend((sample.logit_bias.len() as u32).to_le_bytes());
        for (token, bias) in &sample.logit_bias {
            bytes.extend(token.to_le_bytes());
            bytes.extend(bias.to_le_bytes());
        }
        bytes.extend(sample.seed.to_le_bytes());
        bytes.push(sample.logprobs.is_some() as u8);
        bytes.push(sample.logprobs.unwrap_or(0));
    }
}

/// Decodes a frame into its header and the activations behind it.
///
/// # Errors
/// Anything but a whole header of this version.
pub fn decode(bytes: &[u8]) -> Result<(Frame, &[u8]), WireError> {
    let mut reader = Reader { bytes, at: 0 };
    let magic = reader.take(MAGIC.len())?;
    if magic != MAGIC {
        return Err(WireError::Foreign(format!(
            "expected {MAGIC:?}, found {magic:?}"
        )));
    }
    let version = u16::from_le_bytes(reader.array()?);
    if version != PROTOCOL_VERSION {
        return Err(WireError::Foreign(format!(
            "protocol version {version}, this rank speaks {PROTOCOL_VERSION}"
        )));
    }
    let frame = match reader.array::<1>()?[0] {
        KIND_END => Frame::End,
        KIND_WAKE => Frame::Wake,
        KIND_LOOKUP => Frame::Lookup(decode_tokens(&mut reader)?),
        KIND_STEP => Frame::Step(decode_step(&mut reader)?),
        kind => return Err(WireError::Foreign(format!("unknown kind {kind}"))),
    };
    Ok((frame, &bytes[reader.at..]))
}

fn decode_step(reader: &mut Reader) -> Result<Step, WireError> {
    let number = reader.u64()?;
    let in_flight = u16::from_le_bytes(reader.array()?);
    let upkeep_count = reader.count(UPKEEP_BYTES)?;
    let upkeep = (0..upkeep_count)
        .map(|_| decode_upkeep(reader))
        .collect::<Result<_, _>>()?;
    let loads = match reader.flag()? {
        false => None,
        true => {
            let count = reader.count(LOAD_BYTES)?;
            Some(decode_loads(reader, count)?)
        }
    };
    let entry_count = reader.count(size_of::<u32>())?;
    let entries = (0..entry_count)
        .map(|_| decode_entry(reader))
        .collect::<Result<_, _>>()?;
    Ok(Step {
        number,
        in_flight,
        upkeep,
        loads,
        entries,
    })
}

fn decode_upkeep(reader: &mut Reader) -> Result<Upkeep, WireError> {
    match reader.array::<1>()?[0] {
        UPKEEP_RELEASE => Ok(Upkeep::Release(reader.u32()?)),
        UPKEEP_FORK => Ok(Upkeep::Fork(decode_fork(reader)?)),
        kind => Err(WireError::Foreign(format!("unknown kind of upkeep {kind}"))),
    }
}

fn decode_fork(reader: &mut Reader) -> Result<Fork, WireError> {
    let fork = Fork {
        from: reader.u32()?,
        to: reader.u32()?,
        tokens: reader.u32()?,
    };
    match fork.from == fork.to {
        true => Err(WireError::Inconsistent(format!(
            "slot {} is to begin as itself",
            fork.to
        ))),
        false => Ok(fork),
    }
}

fn decode_loads(reader: &mut Reader, count: usize) -> Result<Vec<Load>, WireError> {
    let load = |reader: &mut Reader| {
        Ok(Load {
            busy_us: reader.u64()?,
            wait_us: reader.u64()?,
            wire_us: reader.u64()?,
            sent_bytes: reader.u64()?,
        })
    };
    (0..count).map(|_| load(reader)).collect()
}

/// At least one token.
fn decode_tokens(reader: &mut Reader) -> Result<Vec<u32>, WireError> {
    match reader.count(size_of::<u32>())? {
        0 => Err(WireError::Inconsistent("a list of tokens is empty".into())),
        count => (0..count).map(|_| reader.u32()).collect(),
    }
}

fn decode_entry(reader: &mut Reader) -> Result<Entry, WireError> {
    let (slot, start) = (reader.u32()?, reader.u32()?);
    let tokens = decode_tokens(reader)?;
    let sample = match reader.flag()? {
        false => None,
        true => Some(decode_sample(reader)?),
    };
    Ok(Entry {
        slot,
        start,
        tokens,
        sample,
    })
}

fn decode_sample(reader: &mut Reader) -> Result<SampleParams, WireError> {
    Ok(SampleParams {
        temperature: reader.f32()?,
        top_p: reader.f32()?,
        top_k: reader.u32()?,
        min_p: reader.f32()?,
        repetition_penalty: reader.f32()?,
        presence_penalty: reader.f32()?,
        frequency_penalty: reader.f32()?,
        prompt_tokens: reader.u32()?,
        logit_bias: {
            let count = reader.count(BIAS_BYTES)?;
            let bias = |_| Ok((reader.u32()?, reader.f32()?));
            (0..count).map(bias).collect::<Result<_, WireError>>()?
        },
        seed: reader.u64()?,
        logprobs: {
            let (given, count) = (reader.flag()?, reader.array::<1>()?[0]);
            given.then_some(count)
        },
    })
}

/// A token that the last rank sampled.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability under the untempered softmax; `None` unless asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens and their logarithms, best first.
    pub top: Vec<(u32, f32)>,
}

/// The tokens sampled in one step, in the order of the entries that ask for one.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The step.
    pub step: u64,
    /// One a sampled entry.
    pub tokens: Vec<SampledToken>,
    /// The loads of all ranks, in their order, where the step asked for them; else empty.
    pub loads: Vec<Load>,
}

/// Bytes of a [`Load`].
const LOAD_BYTES: usize = 32;

/// Bytes of one sampled token: the token, and where asked for its logprob and the top ones.
fn record_bytes(logprobs: Option<u8>) -> usize {
    match logprobs {
        None => 4,
        Some(top) => 8 + 8 * top as usize,
    }
}

impl Sampled {
    /// As many bytes as [`Step::sampled_bytes`] says for the step that it answers.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.step.to_le_bytes().to_vec();
        for token in &self.tokens {
            bytes.extend(token.token.to_le_bytes());
            if let Some(logprob) = token.logprob {
                bytes.extend(logprob.to_le_bytes());
                for (id, logprob) in &token.top {
                    bytes.extend(id.to_le_bytes());
                    bytes.extend(logprob.to_le_bytes());
                }
            }
        }
        encode_loads(&self.loads, &mut bytes);
        bytes
    }

    /// Reads the answer to `step` in a run of so many ranks.
    ///
    /// # Errors
    /// Another length than the step foretells, or another step's number.
    pub fn decode(step: &Step, ranks: usize, bytes: &[u8]) -> Result<Self, WireError> {
        if bytes.len() != step.sampled_bytes(ranks) {
            return Err(WireError::Inconsistent(format!(
                "step {} is answered by {} bytes, expected {}",
                step.number,
                bytes.len(),
                step.sampled_bytes(ranks)
            )));
        }
        let mut reader = Reader { bytes, at: 0 };
        let number = reader.u64()?;
        if number != step.number {
            return Err(WireError::Inconsistent(format!(
                "the answer to step {number} came where step {} was expected",
                step.number
            )));
        }
        let tokens = step
            .sampled()
            .map(|(_, sample)| decode_token(&mut reader, sample.logprobs))
            .collect::<Result<_, _>>()?;
        let loads = match step.loads {
            None => Vec::new(),
            Some(_) => decode_loads(&mut reader, ranks)?,
        };
        Ok(Self {
            step: number,
            tokens,
            loads,
        })
    }
}

fn decode_token(reader: &mut Reader, logprobs: Option<u8>) -> Result<SampledToken, WireError> {
    let token = reader.u32()?;
    let Some(top) = logprobs else {
        return Ok(SampledToken {
            token,
            logprob: None,
            top: Vec::new(),
        });
    };
    Ok(SampledToken {
        token,
        logprob: Some(reader.f32()?),
        top: (0..top)
            .map(|_| Ok((reader.u32()?, reader.f32()?)))
            .collect::<Result<_, _>>()?,
    })
}

/// Reads fields off the front of a frame.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let end = self.at.checked_add(count);
        let found = end.and_then(|end| self.bytes.get(self.at..end));
        let found = found.ok_or(WireError::Short {
            at: self.at,
            length: self.bytes.len(),
        })?;
        self.at += count;
        Ok(found)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn f32(&mut self) -> Result<f32, WireError> {
        Ok(f32::from_le_bytes(self.array()?))
    }

    fn flag(&mut self) -> Result<bool, WireError> {
        match self.array::<1>()?[0] {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(WireError::Inconsistent(format!(
                "a flag is {other}, not 0 or 1"
            ))),
        }
    }

    /// A count of items of at least `item_bytes`, refused if that many cannot follow: a broken
    /// count must not become a huge allocation.
    fn count(&mut self, item_bytes: usize) -> Result<usize, WireError> {
        let count = self.u32()? as usize;
        if count.saturating_mul(item_bytes) > self.bytes.len() - self.at {
            return Err(WireError::Short {
                at: self.at,
                length: self.bytes.len(),
            });
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
