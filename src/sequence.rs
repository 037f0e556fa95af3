//! One request on rank 0, from its prompt's token ids to its answer: decoding, stop texts, the end.
//! Pure: knows no ranks and no arrays.

use crate::request::{
    Answer, FinishReason, LineError, Prompt, Rejection, RejectionCode, Request, TokenChoice,
    TokenLogprob,
};
use crate::sampler;
use crate::tokenizer::{StopMatcher, TextStream, Tokenizer, TokenizerError};
use crate::wire::{SampleParams, SampledToken};

/// What all sequences of a run share.
#[derive(Debug)]
pub struct Rules {
    /// `None` where the checkpoint has none: then only token-id prompts can run.
    pub tokenizer: Option<Tokenizer>,
    /// Plain prompts are taken as they are.
    pub raw: bool,
    /// Tokens that a sequence may hold, prompt and answer together.
    pub context_tokens: usize,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Tokens that end an answer.
    pub end_ids: Vec<u32>,
    /// Key of the random numbers of requests without a seed of their own.
    pub seed: u64,
}

/// A request that is being answered.
#[derive(Debug)]
pub struct Sequence<'r> {
    request: Request,
    rules: &'r Rules,
    prompt_tokens: usize,
    /// Tokens that may still be sampled.
    remaining: usize,
    token_ids: Vec<u32>,
    logprobs: Vec<TokenLogprob>,
    text: String,
    decoder: Option<Decoder<'r>>,
}

/// Turns tokens into text up to a stop text.
#[derive(Debug)]
struct Decoder<'r> {
    stream: TextStream<'r>,
    stops: StopMatcher,
}

/// A sequence ready to be scheduled.
pub struct Admitted<'r> {
    /// Its state on rank 0.
    pub sequence: Sequence<'r>,
    /// Token ids of the prompt, at least one, all within the vocabulary.
    pub prompt: Vec<u32>,
    /// How to sample.
    pub params: SampleParams,
}

impl<'r> Sequence<'r> {
    /// Tokenises a request and checks that it can be run.
    ///
    /// # Errors
    /// No tokenizer or template for this kind of prompt, an id outside the vocabulary, or a prompt that
    /// leaves no room for an answer. Boxed, since a line error carries its whole form.
    pub fn admit(mut request: Request, rules: &'r Rules) -> Result<Admitted<'r>, Box<LineError>> {
        let refuse = |rejection| Box::new(LineError::for_request(&request, rejection));
        let prompt = tokenize(&request, rules).map_err(refuse)?;
        check_prompt(&prompt, rules).map_err(refuse)?;
        check_bias(&request, rules).map_err(refuse)?;
        let sampling = &request.sampling;
        let params = SampleParams {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            prompt_tokens: prompt.len() as u32,
            logit_bias: sampling.logit_bias.clone(),
            // Equal prompts of one file must not get equal answers, unless a seed was asked for.
            seed: sampling
                .seed
                .unwrap_or_else(|| sampler::mix(rules.seed ^ sampler::mix(request.index as u64))),
            logprobs: sampling
                .logprobs
                .map(|count| count.min(rules.vocab_size.min(255) as u8)),
        };
        let room = rules.context_tokens - prompt.len();
        // It is tokens now; what they were, which may be much more, is not held as long as the sequence lives.
        request.prompt = Prompt::Text(String::new());
        let sampling = &request.sampling;
        let sequence = Self {
            rules,
            prompt_tokens: prompt.len(),
            remaining: sampling.max_tokens.min(room),
            token_ids: Vec::new(),
            logprobs: Vec::new(),
            text: String::new(),
            decoder: rules.tokenizer.as_ref().map(|tokenizer| Decoder {
                stream: tokenizer.stream(),
                stops: StopMatcher::new(&sampling.stop),
            }),
            request,
        };
        Ok(Admitted {
            sequence,
            prompt,
            params,
        })
    }

    /// Takes the next sampled token; says why the answer ends, if it does.
    ///
    /// # Errors
    /// A token that the tokenizer cannot decode.
    pub fn accept(
        &mut self,
        sampled: &SampledToken,
    ) -> Result<Option<FinishReason>, TokenizerError> {
        let text_offset_chars = match &self.decoder {
            Some(decoder) => decoder.stream.chars(),
            None => 0,
        };
        self.token_ids.push(sampled.token);
        self.remaining -= 1;
        if let Some(logprob) = sampled.logprob {
            self.logprobs.push(TokenLogprob {
                sampled: self.choice(sampled.token, logprob),
                top: sampled
                    .top
                    .iter()
                    .map(|&(id, logprob)| self.choice(id, logprob))
                    .collect(),
                text_offset_chars,
            });
        }
        if self.rules.end_ids.contains(&sampled.token) {
            return Ok(Some(FinishReason::Stop));
        }
        if let Some(decoder) = &mut self.decoder {
            let piece = decoder.stream.push(sampled.token)?;
            let matched = decoder.stops.push(&piece);
            self.text.push_str(&matched.text);
            if matched.is_stopped {
                return Ok(Some(FinishReason::Stop));
            }
        }
        Ok((self.remaining == 0).then_some(FinishReason::Length))
    }

    /// The request being answered.
    pub fn request(&self) -> &Request {
        &self.request
    }

    /// The text that is certain so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What is known of the last token, if that was asked for.
    pub fn last_logprob(&self) -> Option<&TokenLogprob> {
        self.logprobs.last()
    }

    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// Tokens that may still be sampled, at least one until the answer ends.
    pub fn remaining_tokens(&self) -> usize {
        self.remaining
    }

    /// Tokens sampled so far.
    pub fn sampled_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// The finished answer.
    ///
    /// # Errors
    /// A tail that the tokenizer cannot decode.
    pub fn finish(mut self, finish_reason: FinishReason) -> Result<Answer, TokenizerError> {
        if let Some(Decoder { stream, mut stops }) = self.decoder {
            self.text.push_str(&stops.push(&stream.finish()?).text);
            self.text.push_str(&stops.finish());
        }
        let logprobs = self.request.sampling.logprobs.map(|_| self.logprobs);
        Ok(Answer {
            index: self.request.index,
            form: self.request.form,
            text: self.text,
            token_ids: self.token_ids,
            prompt_tokens: self.prompt_tokens,
            finish_reason,
            logprobs,
        })
    }

    fn choice(&self, id: u32, logprob: f32) -> TokenChoice {
        let tokenizer = self.rules.tokenizer.as_ref();
        TokenChoice {
            id,
            bytes: tokenizer.and_then(|tokenizer| tokenizer.token_bytes(id)),
            logprob,
        }
    }
}

fn tokenize(request: &Request, rules: &Rules) -> Result<Vec<u32>, Rejection> {
    let refuse = |message: String| Rejection::new(RejectionCode::PromptNotTokenizable, message);
    match (&rules.tokenizer, &request.prompt) {
        (Some(tokenizer), prompt) => Ok(tokenizer.encode_prompt(prompt, rules.raw)?),
        (None, Prompt::Tokens(ids)) if request.sampling.stop.is_empty() => Ok(ids.clone()),
        (None, Prompt::Tokens(_)) => Err(refuse(
            "`stop` needs a tokenizer, and the checkpoint has no tokenizer.json".into(),
        )),
        (None, _) => Err(refuse(
            "the checkpoint has no tokenizer.json, so only prompts of token ids can run".into(),
        )),
    }
}

fn check_bias(request: &Request, rules: &Rules) -> Result<(), Rejection> {
    // The last is the largest.
    match request.sampling.logit_bias.last() {
        Some(&(id, _)) if id as usize >= rules.vocab_size => Err(outside("logit_bias", id, rules)),
        _ => Ok(()),
    }
}

fn outside(field: &str, id: u32, rules: &Rules) -> Rejection {
    Rejection::of_field(
        RejectionCode::TokenOutOfVocabulary,
        field,
        format!(
            "token id {id} is outside the model's vocabulary of {} tokens",
            rules.vocab_size
        ),
    )
}

fn check_prompt(prompt: &[u32], rules: &Rules) -> Result<(), Rejection> {
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= rules.vocab_size) {
        return Err(outside("prompt", *id, rules));
    }
    if prompt.len() >= rules.context_tokens {
        return Err(Rejection::of_field(
            RejectionCode::ContextLengthExceeded,
            "prompt",
            format!(
                "the prompt has {} tokens, which leaves no room for an answer in a context of {}; \
                 shorten it, or raise --context if the model allows it",
                prompt.len(),
                rules.context_tokens
            ),
        ));
    }
    Ok(())
}
