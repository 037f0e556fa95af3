//! Makes GGUF files, right ones and wrong ones.

use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// Numbers of the metadata value types.
pub const U32: u32 = 4;
pub const I32: u32 = 5;
pub const F32: u32 = 6;
pub const BOOL: u32 = 7;
pub const STRING: u32 = 8;
pub const ARRAY: u32 = 9;

/// Numbers of the tensor types.
pub const TENSOR_F32: u32 = 0;
pub const TENSOR_F16: u32 = 1;
pub const TENSOR_Q4_0: u32 = 2;
pub const TENSOR_Q4_1: u32 = 3;
pub const TENSOR_Q8_0: u32 = 8;
pub const TENSOR_Q6_K: u32 = 14;
pub const TENSOR_BF16: u32 = 30;

/// Sizes of the tiny networks.
pub const LAYERS: usize = 2;
pub const HIDDEN: usize = 64;
pub const INNER: usize = 96;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD: usize = 16;

/// A tensor to be written; `shape` slowest dimension first.
#[derive(Clone)]
pub struct TensorSpec {
    pub name: String,
    pub shape: Vec<usize>,
    pub type_id: u32,
    pub data: Vec<u8>,
    /// Instead of where the data really is.
    pub offset: Option<u64>,
}

/// A file to be written.
#[derive(Clone)]
pub struct Builder {
    pub version: u32,
    pub pairs: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<TensorSpec>,
    pub alignment: usize,
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

impl Builder {
    pub fn empty() -> Builder {
        Builder {
            version: 3,
            pairs: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
        }
    }

    /// Sets a key to a value given as its type and bytes.
    pub fn raw(mut self, key: &str, value_type: u32, value: &[u8]) -> Builder {
        self = self.without(key);
        let encoded = [&value_type.to_le_bytes(), value].concat();
        self.pairs.push((key.to_owned(), encoded));
        self
    }

    pub fn u32(self, key: &str, value: u32) -> Builder {
        self.raw(key, U32, &value.to_le_bytes())
    }

    pub fn f32(self, key: &str, value: f32) -> Builder {
        self.raw(key, F32, &value.to_le_bytes())
    }

    pub fn flag(self, key: &str, value: bool) -> Builder {
        self.raw(key, BOOL, &[value.into()])
    }

    pub fn text(self, key: &str, value: &str) -> Builder {
        self.raw(key, STRING, &string(value.as_bytes()))
    }

    pub fn texts(self, key: &str, values: &[impl AsRef<str>]) -> Builder {
        let elements = values.iter().map(|value| string(value.as_ref().as_bytes()));
        self.array(
            key,
            STRING,
            values.len(),
            &elements.collect::<Vec<_>>().concat(),
        )
    }

    pub fn integers(self, key: &str, values: &[i32]) -> Builder {
        let elements: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        self.array(key, I32, values.len(), &elements)
    }

    pub fn array(self, key: &str, element_type: u32, count: usize, elements: &[u8]) -> Builder {
        let header = [
            &element_type.to_le_bytes()[..],
            &(count as u64).to_le_bytes(),
        ]
        .concat();
        self.raw(key, ARRAY, &[header.as_slice(), elements].concat())
    }

    pub fn without(mut self, key: &str) -> Builder {
        self.pairs.retain(|(name, _)| name != key);
        self
    }

    /// Adds a tensor, or replaces the one of this name.
    pub fn tensor(mut self, name: &str, shape: &[usize], type_id: u32, data: Vec<u8>) -> Builder {
        self = self.without_tensor(name);
        self.tensors.push(TensorSpec {
            name: name.to_owned(),
            shape: shape.to_vec(),
            type_id,
            data,
            offset: None,
        });
        self
    }

    pub fn without_tensor(mut self, name: &str) -> Builder {
        self.tensors.retain(|tensor| tensor.name != name);
        self
    }

    /// Gives the tensor of this name random contents of another type.
    pub fn retyped(self, name: &str, type_id: u32) -> Builder {
        let shape = self.spec(name).shape.clone();
        let data = random_data(name, &shape, type_id);
        self.tensor(name, &shape, type_id, data)
    }

    pub fn spec(&self, name: &str) -> &TensorSpec {
        let found = self.tensors.iter().find(|tensor| tensor.name == name);
        found.unwrap_or_else(|| panic!("the test has no tensor {name}"))
    }

    pub fn build(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.pairs.len() as u64).to_le_bytes());
        for (key, value) in &self.pairs {
            file.extend(string(key.as_bytes()));
            file.extend(value);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            data.resize(data.len().next_multiple_of(self.alignment), 0);
            file.extend(string(tensor.name.as_bytes()));
            file.extend((tensor.shape.len() as u32).to_le_bytes());
            for &size in tensor.shape.iter().rev() {
                file.extend((size as u64).to_le_bytes());
            }
            file.extend(tensor.type_id.to_le_bytes());
            file.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.data);
        }
        file.resize(file.len().next_multiple_of(self.alignment), 0);
        file.extend(data);
        file
    }
}

/// Bytes that look random and depend on the name alone.
pub fn noise(name: &str) -> impl Iterator<Item = u8> {
    let mut state = name.bytes().fold(0x9e37_79b9_7f4a_7c15u64, |state, byte| {
        (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    std::iter::repeat_with(move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
}

/// Random contents of a tensor, all numbers finite.
pub fn random_data(name: &str, shape: &[usize], type_id: u32) -> Vec<u8> {
    let count: usize = shape.iter().product();
    let mut noise = noise(name);
    let mut next = || noise.next().unwrap_or(0);
    let mut data = Vec::new();
    let (blocks, header_halves, codes) = match type_id {
        TENSOR_F32 => {
            for _ in 0..count {
                data.extend([next(), next(), next(), 0x3c | (next() & 0x80)]);
            }
            return data;
        }
        TENSOR_F16 | TENSOR_BF16 => (count, 1, 0),
        TENSOR_Q4_0 => (count / 32, 1, 16),
        TENSOR_Q4_1 => (count / 32, 2, 16),
        TENSOR_Q8_0 => (count / 32, 1, 32),
        other => panic!("the test has no data for type {other}"),
    };
    for _ in 0..blocks {
        for _ in 0..header_halves {
            // Any sign and mantissa, as f16 an exponent between -10 and -8.
            data.extend([next(), 0x14 | (next() & 0x8b)]);
        }
        for _ in 0..codes {
            data.push(next());
        }
    }
    data
}

/// The vocabulary: the 256 characters of byte-level BPE, a few merged tokens, and one token of every other kind.
pub struct Vocab {
    pub tokens: Vec<String>,
    pub types: Vec<i32>,
    pub merges: Vec<String>,
}

impl Vocab {
    pub fn tiny() -> Vocab {
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let mut tokens: Vec<String> = alphabet.iter().map(char::to_string).collect();
        let merges = ["t h", "th e", "Ġ the", "1 2", "12 3", "123 4", "Ã ©"];
        let merges: Vec<String> = merges.map(str::to_owned).into();
        tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
        // No merge leads here: only a tokenizer that ignores merges finds it.
        tokens.push("whole".to_owned());
        let mut types = vec![1; tokens.len()];
        for (token, token_type) in [
            ("<|begin|>", 3),
            ("<|im_end|>", 3),
            ("<|end|>", 3),
            ("<tool>", 4),
            ("[PAD]", 5),
        ] {
            tokens.push(token.to_owned());
            types.push(token_type);
        }
        Vocab {
            tokens,
            types,
            merges,
        }
    }

    pub fn id(&self, token: &str) -> u32 {
        let found = self.tokens.iter().position(|known| known == token);
        found.unwrap_or_else(|| panic!("the test has no token {token}")) as u32
    }
}

/// A whole tiny model of one family, its matrices Q4_1, its embedding Q8_0, its norms F32, tied.
pub fn model(family: &str) -> Builder {
    let vocab = Vocab::tiny();
    let mut model = Builder::empty()
        .text("general.architecture", family)
        .u32(&format!("{family}.block_count"), LAYERS as u32)
        .u32(&format!("{family}.context_length"), 512)
        .u32(&format!("{family}.embedding_length"), HIDDEN as u32)
        .u32(&format!("{family}.feed_forward_length"), INNER as u32)
        .u32(&format!("{family}.attention.head_count"), HEADS as u32)
        .u32(
            &format!("{family}.attention.head_count_kv"),
            KV_HEADS as u32,
        )
        .f32(&format!("{family}.attention.layer_norm_rms_epsilon"), 1e-5)
        .f32(&format!("{family}.rope.freq_base"), 10_000.0)
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "smollm")
        .texts("tokenizer.ggml.tokens", &vocab.tokens)
        .integers("tokenizer.ggml.token_type", &vocab.types)
        .texts("tokenizer.ggml.merges", &vocab.merges)
        .u32("tokenizer.ggml.bos_token_id", vocab.id("<|begin|>"))
        .u32("tokenizer.ggml.eos_token_id", vocab.id("<|end|>"))
        .text(
            "tokenizer.chat_template",
            "{{ messages[0].content }}<|im_end|>",
        );
    let (query, key) = (HEADS * HEAD, KV_HEADS * HEAD);
    let mut add = |name: String, shape: &[usize], type_id| {
        let data = random_data(&name, shape, type_id);
        model = model.clone().tensor(&name, shape, type_id, data);
    };
    add(
        "token_embd.weight".into(),
        &[vocab.tokens.len(), HIDDEN],
        TENSOR_Q8_0,
    );
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("attn_q", [query, HIDDEN]),
            ("attn_k", [key, HIDDEN]),
            ("attn_v", [key, HIDDEN]),
            ("attn_output", [HIDDEN, query]),
            ("ffn_gate", [INNER, HIDDEN]),
            ("ffn_up", [INNER, HIDDEN]),
            ("ffn_down", [HIDDEN, INNER]),
        ] {
            add(format!("blk.{layer}.{name}.weight"), &shape, TENSOR_Q4_1);
        }
        for name in ["attn_norm", "ffn_norm"] {
            add(format!("blk.{layer}.{name}.weight"), &[HIDDEN], TENSOR_F32);
        }
        match family {
            "qwen2" => {
                for (name, size) in [("attn_q", query), ("attn_k", key), ("attn_v", key)] {
                    add(format!("blk.{layer}.{name}.bias"), &[size], TENSOR_F32);
                }
            }
            "qwen3" => {
                for name in ["attn_q_norm", "attn_k_norm"] {
                    add(format!("blk.{layer}.{name}.weight"), &[HEAD], TENSOR_F32);
                }
            }
            _ => {}
        }
    }
    add("output_norm.weight".into(), &[HIDDEN], TENSOR_F32);
    model
}
