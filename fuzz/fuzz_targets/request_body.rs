//! Any bytes as the body of a request to either endpoint: what is read is within its limits, and nothing panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mlx_pipe::request::{Body, CHOICE_COUNT_MAX, Endpoint, Prompt, Sampling};

fuzz_target!(|bytes: &[u8]| {
    let defaults = Sampling::greedy(16);
    for endpoint in [Some(Endpoint::Completion), Some(Endpoint::Chat), None] {
        let body = match Body::parse(bytes, endpoint, &defaults) {
            Ok(body) => body,
            Err(rejection) => {
                // However long what was sent is, the answer to it is short.
                assert!(rejection.message.len() < 2000, "{}", rejection.message);
                continue;
            }
        };
        body.sampling.validate().expect("checked when it was read");
        assert!(!body.prompts.is_empty() && body.choices > 0);
        assert!(body.prompts.len() * body.choices <= CHOICE_COUNT_MAX);
        for prompt in &body.prompts {
            match prompt {
                Prompt::Tokens(ids) => assert!(!ids.is_empty()),
                Prompt::Chat(chat) => assert!(!chat.messages.is_empty()),
                Prompt::Text(_) => {}
                Prompt::Plain(_) => panic!("a body holds no plain line"),
            }
        }
        let is_sorted = |pair: &[(u32, f32)]| pair[0].0 < pair[1].0;
        assert!(body.sampling.logit_bias.windows(2).all(is_sorted));
        let _ = body.single();
    }
});
