//! `config.json` read into an [`Architecture`]: every tensor that the model is made of, by name,
//! shape and kind, before any of them is touched. The plan counts bytes with it, the loader asks for
//! exactly these, and what a checkpoint holds beyond them is an error. Pure: knows no arrays.

use super::fields::{ConfigError, Fields};
use super::quantization::{Affine, Quantization};
use super::{llama, qwen2, qwen3};
use serde_json::Value;

/// What a family (`model_type`) fixes, each in its own file.
#[derive(Debug, Clone, PartialEq)]
pub struct Family {
    /// Width of one attention head.
    pub head_dim: usize,
    /// Heads of keys and values.
    pub kv_head_count: usize,
    /// `q_proj`, `k_proj` and `v_proj` have a bias.
    pub qkv_bias: bool,
    /// `o_proj` has a bias.
    pub o_bias: bool,
    /// The projections of the MLP have a bias.
    pub mlp_bias: bool,
    /// Queries and keys are normalised per head.
    pub qk_norm: bool,
    /// The head is the embedding table.
    pub tied: bool,
    /// Longest sequence that the model was made for, tokens.
    pub context_tokens: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
}

/// How rotary positions are stretched for long contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions are divided by the factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: low frequencies are divided by the factor, high ones kept, those between blended.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// Context of the model before it was stretched, tokens.
        original_context: f64,
    },
}

/// What a tensor's elements are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementKind {
    /// Packed codes of a quantised weight: U32.
    Codes,
    /// Numbers: F32, F16 or BF16.
    Float,
}

/// One tensor that the model needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the checkpoint.
    pub name: String,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Kind of its elements.
    pub kind: ElementKind,
}

/// A weight `[outputs, inputs]`: a linear layer, or the embedding table (`[vocabulary, hidden]`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearSpec {
    /// Module name: `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Rows of the weight.
    pub outputs: usize,
    /// Columns of the weight.
    pub inputs: usize,
    /// Whether a bias `[outputs]` is added.
    pub bias: bool,
    /// `None`: plain floats.
    pub quantized: Option<Affine>,
}

/// An RMS norm's weight, `[width]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NormSpec {
    /// Module name: `model.layers.0.input_layernorm`.
    pub name: String,
    /// Length of the weight.
    pub width: usize,
}

/// The tensors of one transformer layer, in the order of the forward pass.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// Norm before attention.
    pub input_layernorm: NormSpec,
    /// Query projection.
    pub q_proj: LinearSpec,
    /// Key projection.
    pub k_proj: LinearSpec,
    /// Value projection.
    pub v_proj: LinearSpec,
    /// Norms of queries and keys per head, where the family has them.
    pub qk_norm: Option<(NormSpec, NormSpec)>,
    /// Output projection of attention.
    pub o_proj: LinearSpec,
    /// Norm before the MLP.
    pub post_attention_layernorm: NormSpec,
    /// Gate of the MLP.
    pub gate_proj: LinearSpec,
    /// Up projection of the MLP.
    pub up_proj: LinearSpec,
    /// Down projection of the MLP.
    pub down_proj: LinearSpec,
}

/// What keys and values are kept as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvNumber {
    /// Bytes of an element.
    pub bytes: usize,
    /// Bytes beside a head's elements, of each token.
    pub scale_bytes: usize,
}

impl LayerSpec {
    /// All of its linear layers, in the order of the mathematics.
    pub fn linears(&self) -> [&LinearSpec; 7] {
        [
            &self.q_proj,
            &self.k_proj,
            &self.v_proj,
            &self.o_proj,
            &self.gate_proj,
            &self.up_proj,
            &self.down_proj,
        ]
    }
}

/// Where the head's weight comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum HeadSpec {
    /// The embedding table is the head.
    Tied,
    /// A weight of its own.
    Own(LinearSpec),
}

/// A whole model, as its configuration and the names in its checkpoint describe it.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// `llama`, `qwen2` or `qwen3`.
    pub model_type: String,
    /// Width of the hidden state.
    pub hidden_size: usize,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Query heads.
    pub head_count: usize,
    /// Epsilon of every RMS norm.
    pub rms_norm_eps: f32,
    /// Stretching of the rotary positions.
    pub rope_scaling: RopeScaling,
    /// What the family fixes.
    pub family: Family,
    /// The embedding table.
    pub embed_tokens: LinearSpec,
    /// The layers, first to last.
    pub layers: Vec<LayerSpec>,
    /// The norm after the last layer.
    pub norm: NormSpec,
    /// The head.
    pub head: HeadSpec,
}

impl Architecture {
    /// Reads a configuration. `has_tensor` tells whether the checkpoint holds a tensor of a name
    /// (modules without scales are not quantised).
    ///
    /// # Errors
    /// A field missing, of the wrong type, or asking for what this version lacks.
    pub fn read(config: &Value, has_tensor: impl Fn(&str) -> bool) -> Result<Self, ConfigError> {
        let fields = Fields::top(config, "config.json")?;
        let model_type = fields.text("model_type")?;
        let family = match model_type {
            "llama" => llama::family(&fields)?,
            "qwen2" => qwen2::family(&fields)?,
            "qwen3" => qwen3::family(&fields)?,
            other => {
                return Err(ConfigError::UnknownModelType {
                    found: other.to_owned(),
                });
            }
        };
        refuse_unsupported(&fields)?;
        let head_count = fields.size("num_attention_heads")?;
        check_heads(&fields, head_count, &family)?;
        let builder = Builder {
            quantization: Quantization::read(&fields)?,
            has_tensor,
            hidden_size: fields.size("hidden_size")?,
            intermediate_size: fields.size("intermediate_size")?,
            head_count,
            family: &family,
        };
        let vocab_size = fields.size("vocab_size")?;
        let layer_count = fields.size("num_hidden_layers")?;
        if layer_count > 4096 {
            return Err(fields.wrong("num_hidden_layers", &layer_count.into(), "at most 4096"));
        }
        let head = match family.tied {
            true => HeadSpec::Tied,
            false => {
                HeadSpec::Own(builder.linear("lm_head", vocab_size, builder.hidden_size, false)?)
            }
        };
        Ok(Self {
            model_type: model_type.to_owned(),
            hidden_size: builder.hidden_size,
            vocab_size,
            head_count,
            rms_norm_eps: fields.positive("rms_norm_eps")? as f32,
            rope_scaling: read_rope_scaling(&fields)?,
            embed_tokens: builder.linear(
                "model.embed_tokens",
                vocab_size,
                builder.hidden_size,
                false,
            )?,
            layers: (0..layer_count)
                .map(|layer| builder.layer(layer))
                .collect::<Result<_, _>>()?,
            norm: NormSpec {
                name: "model.norm".into(),
                width: builder.hidden_size,
            },
            head,
            family,
        })
    }

    /// The weight of the head: its own, or the embedding table.
    pub fn head_weight(&self) -> &LinearSpec {
        match &self.head {
            HeadSpec::Own(spec) => spec,
            HeadSpec::Tied => &self.embed_tokens,
        }
    }

    /// Whether the weights of all layers are quantised.
    pub fn is_quantized(&self) -> bool {
        let mut linears = self.layers.iter().flat_map(LayerSpec::linears);
        linears.all(|linear| linear.quantized.is_some())
    }

    /// Bytes of keys and values that one token takes in one layer.
    pub fn kv_bytes_per_token_per_layer(&self, number: KvNumber) -> u64 {
        let head_bytes = self.family.head_dim * number.bytes + number.scale_bytes;
        2 * (self.family.kv_head_count * head_bytes) as u64
    }
}

/// The rotary dimension is even, and query heads share key heads evenly.
fn check_heads(fields: &Fields, head_count: usize, family: &Family) -> Result<(), ConfigError> {
    if !head_count.is_multiple_of(family.kv_head_count) {
        return Err(fields.wrong(
            "num_key_value_heads",
            &family.kv_head_count.into(),
            format!("a divisor of `num_attention_heads` ({head_count})"),
        ));
    }
    if !family.head_dim.is_multiple_of(2) {
        return Err(fields.wrong("head_dim", &family.head_dim.into(), "an even number"));
    }
    Ok(())
}

/// The base of the rotary frequencies: at the top level, or under `rope_parameters` where newer
/// tools put it.
pub(super) fn rope_theta(fields: &Fields) -> Result<Option<f64>, ConfigError> {
    match fields.positive_or_none("rope_theta")? {
        Some(theta) => Ok(Some(theta)),
        None => match fields.object("rope_parameters")? {
            Some(parameters) => parameters.positive_or_none("rope_theta"),
            None => Ok(None),
        },
    }
}

/// `head_dim`, or hidden size over heads where the family allows to leave it out.
pub(super) fn head_dim_or_derived(fields: &Fields) -> Result<usize, ConfigError> {
    let hidden = fields.size("hidden_size")?;
    let heads = fields.size("num_attention_heads")?;
    match fields.size_or_none("head_dim")? {
        Some(head_dim) => Ok(head_dim),
        None if hidden.is_multiple_of(heads) => Ok(hidden / heads),
        None => Err(fields.wrong(
            "hidden_size",
            &hidden.into(),
            format!("a multiple of `num_attention_heads` ({heads}), or a `head_dim`"),
        )),
    }
}

/// Refuses what would change the answers and is not implemented. A `sliding_window` alone is none of it:
/// without `layer_types` or `use_sliding_window`, mlx-lm computes full attention too.
fn refuse_unsupported(fields: &Fields) -> Result<(), ConfigError> {
    refuse_sliding_window(fields)?;
    refuse_two_quantizations(fields)?;
    for name in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if fields.value(name).is_some() {
            return Err(fields.unsupported(name, "capped logits"));
        }
    }
    if fields.flag_or("rope_traditional", false)? {
        return Err(fields.unsupported("rope_traditional", "interleaved rotary pairs"));
    }
    let rope_parameters = fields.object("rope_parameters")?;
    for place in [Some(fields), rope_parameters.as_ref()]
        .into_iter()
        .flatten()
    {
        if place.positive_or("partial_rotary_factor", 1.0)? != 1.0 {
            let what = "rotary positions on a part of each head";
            return Err(place.unsupported("partial_rotary_factor", what));
        }
    }
    match fields.text_or_none("hidden_act")? {
        None | Some("silu") => Ok(()),
        Some(other) => Err(fields.unsupported("hidden_act", format!("the activation \"{other}\""))),
    }
}

/// Refuses layers that see only a window of the past.
fn refuse_sliding_window(fields: &Fields) -> Result<(), ConfigError> {
    if let Some(value) = fields.value("layer_types") {
        let types = value.as_array().map(Vec::as_slice).unwrap_or_default();
        if !value.is_array() || !types.iter().all(Value::is_string) {
            return Err(fields.wrong("layer_types", value, "a list of strings"));
        }
        if let Some(other) = types.iter().find(|kind| *kind != "full_attention") {
            return Err(fields.unsupported("layer_types", format!("layers of {other}")));
        }
    }
    if fields.flag_or("use_sliding_window", false)? {
        return Err(fields.unsupported("use_sliding_window", "sliding-window attention"));
    }
    Ok(())
}

/// Converters write the same object under both names; two that differ leave open which one the weights
/// were made with.
fn refuse_two_quantizations(fields: &Fields) -> Result<(), ConfigError> {
    let (Some(ours), Some(other)) = (
        fields.object("quantization")?,
        fields.object("quantization_config")?,
    ) else {
        return Ok(());
    };
    for name in ["bits", "group_size"] {
        let (expected, found) = (ours.value(name), other.value(name));
        if let (Some(expected), Some(found)) = (expected, found)
            && expected != found
        {
            let what = format!("{found} where `quantization.{name}` says {expected}");
            return Err(other.unsupported(name, what));
        }
    }
    Ok(())
}

fn read_rope_scaling(fields: &Fields) -> Result<RopeScaling, ConfigError> {
    let (name, scaling) = match fields.object("rope_scaling")? {
        Some(scaling) => ("rope_scaling", scaling),
        None => match fields.object("rope_parameters")? {
            Some(scaling) => ("rope_parameters", scaling),
            None => return Ok(RopeScaling::None),
        },
    };
    let (old_name, new_name) = (
        scaling.text_or_none("type")?,
        scaling.text_or_none("rope_type")?,
    );
    if let (Some(old), Some(new)) = (old_name, new_name)
        && old != new
    {
        let what = format!("\"{new}\" where `type` says \"{old}\"");
        return Err(scaling.unsupported("rope_type", what));
    }
    let kind = old_name.or(new_name).unwrap_or("default");
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear {
            factor: scaling.positive("factor")?,
        }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: scaling.positive("factor")?,
            low_freq_factor: scaling.positive_or("low_freq_factor", 1.0)?,
            high_freq_factor: scaling.positive_or("high_freq_factor", 4.0)?,
            original_context: scaling.positive_or("original_max_position_embeddings", 8192.0)?,
        }),
        other => Err(fields.unsupported(name, format!("rope scaling \"{other}\""))),
    }
}

/// Makes the specs of modules; holds what they have in common.
struct Builder<'a, F> {
    quantization: Quantization,
    has_tensor: F,
    hidden_size: usize,
    intermediate_size: usize,
    head_count: usize,
    family: &'a Family,
}

impl<F: Fn(&str) -> bool> Builder<'_, F> {
    fn linear(
        &self,
        name: &str,
        outputs: usize,
        inputs: usize,
        bias: bool,
    ) -> Result<LinearSpec, ConfigError> {
        let has_scales = (self.has_tensor)(&format!("{name}.scales"));
        let quantized = self.quantization.of(name, has_scales);
        if let Some(affine) = quantized
            && !inputs.is_multiple_of(affine.group_size)
        {
            return Err(ConfigError::Inconsistent(format!(
                "`{name}` has {inputs} inputs, which groups of {} do not divide",
                affine.group_size
            )));
        }
        Ok(LinearSpec {
            name: name.to_owned(),
            outputs,
            inputs,
            bias,
            quantized,
        })
    }

    fn layer(&self, layer: usize) -> Result<LayerSpec, ConfigError> {
        let (hidden, inner, family) = (self.hidden_size, self.intermediate_size, self.family);
        let q_width = self.head_count * family.head_dim;
        let kv_width = family.kv_head_count * family.head_dim;
        let prefix = format!("model.layers.{layer}");
        let norm = |name: &str, width| NormSpec {
            name: format!("{prefix}.{name}"),
            width,
        };
        let linear = |name: &str, outputs, inputs, bias| {
            self.linear(&format!("{prefix}.{name}"), outputs, inputs, bias)
        };
        Ok(LayerSpec {
            input_layernorm: norm("input_layernorm", hidden),
            q_proj: linear("self_attn.q_proj", q_width, hidden, family.qkv_bias)?,
            k_proj: linear("self_attn.k_proj", kv_width, hidden, family.qkv_bias)?,
            v_proj: linear("self_attn.v_proj", kv_width, hidden, family.qkv_bias)?,
            qk_norm: family.qk_norm.then(|| {
                (
                    norm("self_attn.q_norm", family.head_dim),
                    norm("self_attn.k_norm", family.head_dim),
                )
            }),
            o_proj: linear("self_attn.o_proj", hidden, q_width, family.o_bias)?,
            post_attention_layernorm: norm("post_attention_layernorm", hidden),
            gate_proj: linear("mlp.gate_proj", inner, hidden, family.mlp_bias)?,
            up_proj: linear("mlp.up_proj", inner, hidden, family.mlp_bias)?,
            down_proj: linear("mlp.down_proj", hidden, inner, family.mlp_bias)?,
        })
    }
}

impl LinearSpec {
    /// The tensors of this weight: codes, scales and biases, or the plain weight; then the bias.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let tensor = |suffix: &str, shape: Vec<usize>, kind| TensorSpec {
            name: format!("{}.{suffix}", self.name),
            shape,
            kind,
        };
        let mut tensors = match self.quantized {
            None => vec![tensor(
                "weight",
                vec![self.outputs, self.inputs],
                ElementKind::Float,
            )],
            Some(affine) => {
                let groups = vec![self.outputs, affine.groups(self.inputs)];
                vec![
                    tensor(
                        "weight",
                        vec![self.outputs, affine.words(self.inputs)],
                        ElementKind::Codes,
                    ),
                    tensor("scales", groups.clone(), ElementKind::Float),
                    tensor("biases", groups, ElementKind::Float),
                ]
            }
        };
        if self.bias {
            tensors.push(tensor("bias", vec![self.outputs], ElementKind::Float));
        }
        tensors
    }
}

impl NormSpec {
    /// The one tensor of a norm.
    pub fn tensor(&self) -> TensorSpec {
        TensorSpec {
            name: format!("{}.weight", self.name),
            shape: vec![self.width],
            kind: ElementKind::Float,
        }
    }
}

impl LayerSpec {
    /// Every tensor of this layer.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let linears = [
            &self.q_proj,
            &self.k_proj,
            &self.v_proj,
            &self.o_proj,
            &self.gate_proj,
            &self.up_proj,
            &self.down_proj,
        ];
        let norms = [&self.input_layernorm, &self.post_attention_layernorm];
        let qk_norms = self.qk_norm.iter().flat_map(|(q, k)| [q, k]);
        linears
            .into_iter()
            .flat_map(LinearSpec::tensors)
            .chain(norms.into_iter().chain(qk_norms).map(NormSpec::tensor))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A small llama with `changes` laid over it.
    fn read(changes: Value) -> Result<Architecture, ConfigError> {
        let mut config = json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 10,
            "rms_norm_eps": 1e-5,
        });
        for (name, value) in changes.as_object().unwrap() {
            config[name] = value.clone();
        }
        Architecture::read(&config, |_| false)
    }

    #[test]
    fn fields_that_would_change_the_answers_are_refused_by_name() {
        let linear = json!({"type": "linear", "rope_type": "llama3", "factor": 2});
        let (four, eight) = (
            json!({"bits": 4, "group_size": 64}),
            json!({"bits": 8, "group_size": 64}),
        );
        for (changes, field) in [
            (json!({"hidden_act": "gelu"}), "hidden_act"),
            (
                json!({"partial_rotary_factor": 0.5}),
                "partial_rotary_factor",
            ),
            (
                json!({"rope_parameters": {"partial_rotary_factor": 0.5}}),
                "rope_parameters.partial_rotary_factor",
            ),
            (
                json!({"attn_logit_softcapping": 50.0}),
                "attn_logit_softcapping",
            ),
            (
                json!({"final_logit_softcapping": 30}),
                "final_logit_softcapping",
            ),
            (
                json!({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}),
                "layer_types",
            ),
            (json!({"use_sliding_window": true}), "use_sliding_window"),
            (json!({"rope_traditional": true}), "rope_traditional"),
            (json!({"rope_scaling": linear}), "rope_scaling.rope_type"),
            (
                json!({"quantization": four, "quantization_config": eight}),
                "quantization_config.bits",
            ),
        ] {
            match read(changes) {
                Err(ConfigError::Unsupported {
                    file: "config.json",
                    field: found,
                    ..
                }) => assert_eq!(found, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }

    #[test]
    fn layer_types_of_the_wrong_type_are_an_error() {
        for wrong in [json!("full_attention"), json!([1]), json!({}), json!(0)] {
            let error = read(json!({"layer_types": wrong})).unwrap_err();
            assert!(
                matches!(&error, ConfigError::Wrong { field, .. } if field == "layer_types"),
                "{error}"
            );
        }
    }

    #[test]
    fn neutral_values_of_the_same_fields_are_fine() {
        let plain = read(json!({})).unwrap();
        for neutral in [
            json!({"hidden_act": "silu"}),
            json!({"hidden_act": null, "partial_rotary_factor": 1.0}),
            json!({"attn_logit_softcapping": null, "final_logit_softcapping": null}),
            json!({"layer_types": ["full_attention", "full_attention"]}),
            json!({"sliding_window": 4096}),
            json!({"rope_scaling": {"type": "default", "rope_type": "default"}}),
        ] {
            assert_eq!(read(neutral.clone()).unwrap(), plain, "{neutral}");
        }
        let both = json!({"bits": 4, "group_size": 64});
        read(json!({"quantization": both, "quantization_config": both})).unwrap();
    }
}
