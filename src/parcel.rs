//! What a rank that has the model and one that has not tell each other while weights are handed over, as
//! bytes. Pure.
//!
//! Things are handed over one after the other, each as chunks in order and then a seal with its length and hash. The
//! receiver answers every chunk, so that the sender knows how many are on their way. Everything is
//! little-endian; what does not fit the bytes that are there is an error before anything acts on it.

/// Most bytes of a thing in one message.
pub const CHUNK_BYTES: usize = 4 << 20;
/// Bytes of a message before those of the thing.
pub const HEAD_BYTES: usize = 4 + 1 + 4 + 8;

const MAGIC: [u8; 4] = *b"MXPP";
const KIND_CHUNK: u8 = 1;
const KIND_SEAL: u8 = 2;
const KIND_TAKEN: u8 = 3;
/// Length of a BLAKE3 hash.
const HASH_BYTES: usize = 32;

/// Why a message was refused.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
pub enum ParcelError {
    /// Not a message of this kind, or of another version.
    #[error("a message of {0} bytes that is no part of a handover")]
    Foreign(usize),
    /// A body of another length than its kind has.
    #[error("a message of {found} bytes where its kind has {expected}")]
    WrongLength {
        /// Bytes that the kind has; the most where it may vary.
        expected: usize,
        /// Bytes there are.
        found: usize,
    },
}

/// One message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parcel<'a> {
    /// A part of the thing `item`.
    Chunk {
        /// Number of the thing, from 0.
        item: u32,
        /// Where in the thing the bytes begin.
        offset: u64,
        /// At least one, [`CHUNK_BYTES`] at most.
        bytes: &'a [u8],
    },
    /// The thing `item` has been sent whole.
    Seal {
        /// Number of the thing.
        item: u32,
        /// Its length.
        length: u64,
        /// BLAKE3 of all of it.
        hash: [u8; HASH_BYTES],
    },
    /// The receiver has taken the chunk of `item` that began at `offset`.
    Taken {
        /// Number of the thing.
        item: u32,
        /// Where the chunk began.
        offset: u64,
    },
}

impl<'a> Parcel<'a> {
    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        match *self {
            Self::Chunk {
                item,
                offset,
                bytes,
            } => [&head(KIND_CHUNK, item, offset)[..], bytes].concat(),
            Self::Seal { item, length, hash } => {
                [&head(KIND_SEAL, item, length)[..], &hash].concat()
            }
            Self::Taken { item, offset } => head(KIND_TAKEN, item, offset).to_vec(),
        }
    }

    /// Reads a message.
    ///
    /// # Errors
    /// [`ParcelError`] for anything that [`Self::encode`] does not make.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, ParcelError> {
        let foreign = ParcelError::Foreign(bytes.len());
        let (head, body) = bytes.split_at_checked(HEAD_BYTES).ok_or(foreign)?;
        let (magic, rest) = head.split_at(MAGIC.len());
        let (kind, numbers) = rest.split_at(1);
        let (item, number) = numbers.split_at(4);
        if magic != MAGIC {
            return Err(foreign);
        }
        let item = u32::from_le_bytes(item.try_into().map_err(|_| foreign)?);
        let number = u64::from_le_bytes(number.try_into().map_err(|_| foreign)?);
        let wrong_length = |body_bytes: usize| ParcelError::WrongLength {
            expected: HEAD_BYTES + body_bytes,
            found: bytes.len(),
        };
        match kind[0] {
            KIND_CHUNK if body.is_empty() || body.len() > CHUNK_BYTES => {
                Err(wrong_length(CHUNK_BYTES))
            }
            KIND_CHUNK => Ok(Self::Chunk {
                item,
                offset: number,
                bytes: body,
            }),
            KIND_SEAL => Ok(Self::Seal {
                item,
                length: number,
                hash: body.try_into().map_err(|_| wrong_length(HASH_BYTES))?,
            }),
            KIND_TAKEN if !body.is_empty() => Err(wrong_length(0)),
            KIND_TAKEN => Ok(Self::Taken {
                item,
                offset: number,
            }),
            _ => Err(foreign),
        }
    }
}

/// A chunk whose bytes `fill` writes straight into the message.
///
/// # Errors
/// Those of `fill`.
pub fn chunk<E>(
    item: u32,
    offset: u64,
    length: usize,
    fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
) -> Result<Vec<u8>, E> {
    let mut message = vec![0; HEAD_BYTES + length];
    message[..HEAD_BYTES].copy_from_slice(&head(KIND_CHUNK, item, offset));
    fill(&mut message[HEAD_BYTES..])?;
    Ok(message)
}

fn head(kind: u8, item: u32, number: u64) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    head[..4].copy_from_slice(&MAGIC);
    head[4] = kind;
    head[5..9].copy_from_slice(&item.to_le_bytes());
    head[9..].copy_from_slice(&number.to_le_bytes());
    head
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_message_comes_back(item: u32, number: u64, bytes in prop::collection::vec(any::<u8>(), 1..100), hash: [u8; 32]) {
            for parcel in [
                Parcel::Chunk { item, offset: number, bytes: &bytes },
                Parcel::Seal { item, length: number, hash },
                Parcel::Taken { item, offset: number },
            ] {
                let encoded = parcel.encode();
                prop_assert_eq!(Parcel::decode(&encoded), Ok(parcel));
            }
            let filled = chunk::<()>(item, number, bytes.len(), |to| {
                to.copy_from_slice(&bytes);
                Ok(())
            });
            prop_assert_eq!(filled.unwrap(), Parcel::Chunk { item, offset: number, bytes: &bytes }.encode());
        }

        #[test]
        fn a_message_cut_short_is_an_error_or_a_shorter_chunk(item: u32, number: u64, hash: [u8; 32], cut in 0usize..64) {
            for parcel in [Parcel::Seal { item, length: number, hash }, Parcel::Taken { item, offset: number }] {
                let whole = parcel.encode();
                let cut = cut.min(whole.len() - 1);
                prop_assert!(Parcel::decode(&whole[..cut]).is_err());
                prop_assert!(Parcel::decode(&[&whole[..], &[0]].concat()).is_err());
            }
            let whole = Parcel::Chunk { item, offset: number, bytes: &hash }.encode();
            match Parcel::decode(&whole[..cut.min(whole.len())]) {
                Ok(Parcel::Chunk { bytes, .. }) => prop_assert!(hash.starts_with(bytes) && !bytes.is_empty()),
                Ok(other) => prop_assert!(false, "{other:?}"),
                Err(_) => prop_assert!(cut <= HEAD_BYTES),
            }
        }

        #[test]
        fn any_bytes_are_a_message_that_encodes_to_them_or_an_error(mut bytes in prop::collection::vec(any::<u8>(), 0..80), ours: bool) {
            if ours {
                for (byte, &magic) in bytes.iter_mut().zip(&MAGIC) {
                    *byte = magic;
                }
                if let Some(kind) = bytes.get_mut(4) {
                    *kind %= 5;
                }
            }
            if let Ok(parcel) = Parcel::decode(&bytes) {
                prop_assert_eq!(parcel.encode(), bytes);
            }
        }
    }

    #[test]
    fn a_chunk_over_the_limit_is_refused() {
        let bytes = vec![0; CHUNK_BYTES + 1];
        let parcel = Parcel::Chunk {
            item: 0,
            offset: 0,
            bytes: &bytes,
        };
        let error = Parcel::decode(&parcel.encode()).unwrap_err();
        assert!(matches!(error, ParcelError::WrongLength { .. }), "{error}");
    }
}
