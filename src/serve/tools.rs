//! Tool calls in the text of an answer, in the form of Qwen's and Hermes' templates:
//! `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Pure.
//!
//! A call is told when it is whole. What looks like one and is not stays text, so that nothing is lost.

use serde_json::{Map, Value};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// A call of a tool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// The tool.
    pub name: String,
    /// Its arguments: the text of a JSON object, as far as the model keeps to that.
    pub arguments: String,
}

/// What an answer consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Text, never empty.
    Text(String),
    /// A call.
    Call(ToolCall),
}

/// Finds calls in an answer that comes in pieces. How it is cut changes nothing but how texts are.
#[derive(Debug, Default)]
pub struct ToolParser {
    /// What is neither text for certain nor a whole call.
    held: String,
    is_inside: bool,
    /// Bytes of `held` in which no end of the call begins.
    searched: usize,
    /// The last part was a call: space that follows is no text.
    is_after_call: bool,
}

impl ToolParser {
    /// Takes more of the answer; what is certain now.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        while let Some(part) = self.next() {
            if let Part::Text(text) = &part
                && text.is_empty()
            {
                continue;
            }
            parts.push(part);
        }
        parts
    }

    /// The answer has ended; what was held back.
    pub fn finish(mut self) -> Vec<Part> {
        let rest = std::mem::take(&mut self.held);
        let part = match self.is_inside {
            // Some models end their answer instead of the call.
            true => call(&rest).map_or_else(|| Part::Text(format!("{OPEN}{rest}")), Part::Call),
            false => Part::Text(rest),
        };
        match part {
            Part::Text(text) if text.is_empty() => Vec::new(),
            part => vec![part],
        }
    }

    /// The next part of what is held; a text may be empty. `None` if more is needed.
    fn next(&mut self) -> Option<Part> {
        match self.is_inside {
            true => self.next_call(),
            false => self.next_text(),
        }
    }

    fn next_text(&mut self) -> Option<Part> {
        if self.is_after_call {
            let text = self.held.trim_start();
            self.held.drain(..self.held.len() - text.len());
        }
        if let Some(start) = self.held.find(OPEN) {
            let rest = self.held.split_off(start + OPEN.len());
            let text = std::mem::replace(&mut self.held, rest);
            self.is_inside = true;
            self.searched = 0;
            // Space before a call is no text either.
            return Some(Part::Text(text[..start].trim_end().to_owned()));
        }
        let certain = self.held.len() - may_be_call_bytes(&self.held);
        if certain == 0 {
            return None;
        }
        self.is_after_call = false;
        let rest = self.held.split_off(certain);
        Some(Part::Text(std::mem::replace(&mut self.held, rest)))
    }

    fn next_call(&mut self) -> Option<Part> {
        let unsearched = self.held.as_bytes().get(self.searched..)?;
        let mut windows = unsearched.windows(CLOSE.len());
        let found = windows.position(|window| window == CLOSE.as_bytes());
        let Some(end) = found.map(|end| self.searched + end) else {
            self.searched = self.held.len().saturating_sub(CLOSE.len() - 1);
            return None;
        };
        let rest = self.held.split_off(end + CLOSE.len());
        let mut body = std::mem::replace(&mut self.held, rest);
        self.is_inside = false;
        body.truncate(end);
        Some(match call(&body) {
            Some(call) => {
                self.is_after_call = true;
                Part::Call(call)
            }
            None => {
                self.is_after_call = false;
                Part::Text(format!("{OPEN}{body}{CLOSE}"))
            }
        })
    }
}

/// Bytes at the end that may be the beginning of a call, or space before one.
fn may_be_call_bytes(text: &str) -> usize {
    let begun = (1..OPEN.len())
        .rev()
        .find(|&count| text.ends_with(&OPEN[..count]));
    let begun = begun.unwrap_or(0);
    let before = &text[..text.len() - begun];
    begun + before.len() - before.trim_end().len()
}

/// The call that a text between the marks stands for.
fn call(text: &str) -> Option<ToolCall> {
    let mut fields: Map<String, Value> = serde_json::from_str(text.trim()).ok()?;
    let Some(Value::String(name)) = fields.remove("name") else {
        return None;
    };
    let arguments = match fields
        .remove("arguments")
        .or_else(|| fields.remove("parameters"))
    {
        None | Some(Value::Null) => "{}".to_owned(),
        Some(Value::String(text)) => text,
        Some(arguments) => arguments.to_string(),
    };
    Some(ToolCall { name, arguments })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(pieces: &[&str]) -> Vec<Part> {
        let mut parser = ToolParser::default();
        let mut parts: Vec<Part> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
        parts.extend(parser.finish());
        joined(parts)
    }

    /// Texts that follow each other as one.
    fn joined(parts: Vec<Part>) -> Vec<Part> {
        let mut joined: Vec<Part> = Vec::new();
        for part in parts {
            match (joined.last_mut(), part) {
                (Some(Part::Text(before)), Part::Text(text)) => before.push_str(&text),
                (_, part) => joined.push(part),
            }
        }
        joined
    }

    fn text(text: &str) -> Part {
        Part::Text(text.to_owned())
    }

    fn called(name: &str, arguments: &str) -> Part {
        Part::Call(ToolCall {
            name: name.to_owned(),
            arguments: arguments.to_owned(),
        })
    }

    #[test]
    fn calls_are_found_and_the_text_around_them_is_kept() {
        let answer = "Let me look.\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"b\": 2, \"a\": [1.5, null]}}\n\
                      </tool_call>\n<tool_call>{\"name\": \"now\"}</tool_call>\nDone";
        let expected = [
            text("Let me look."),
            called("add", r#"{"b":2,"a":[1.5,null]}"#),
            called("now", "{}"),
            text("Done"),
        ];
        assert_eq!(parse(&[answer]), expected);
        let one_by_one: Vec<String> = answer.chars().map(String::from).collect();
        let one_by_one: Vec<&str> = one_by_one.iter().map(String::as_str).collect();
        assert_eq!(parse(&one_by_one), expected);
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for answer in [
            "",
            "a < b",
            "<tool_call",
            "<tool_call>",
            "<tool_call>{\"name\": 5}</tool_call>",
            "<tool_call>{]</tool_call> ",
            "<tool_call>[1]</tool_call>",
            "</tool_call> é",
            "  spaces  ",
        ] {
            let parts = parse(&[answer]);
            let expected = match answer {
                "" => vec![],
                answer => vec![text(answer)],
            };
            assert_eq!(parts, expected, "{answer}");
        }
    }

    #[test]
    fn a_call_that_the_answer_ends_in_counts_if_it_is_whole() {
        assert_eq!(
            parse(&["<tool_call>{\"name\": \"f\", \"arguments\": \"x\"}"]),
            [called("f", "x")]
        );
        assert_eq!(
            parse(&["<tool_call>{\"name\": \"f\""]),
            [text("<tool_call>{\"name\": \"f\"")]
        );
    }

    #[test]
    fn text_is_not_held_back_longer_than_it_must_be() {
        let mut parser = ToolParser::default();
        assert_eq!(parser.push("Hello"), [text("Hello")]);
        assert_eq!(parser.push(" "), []);
        assert_eq!(parser.push("<tool"), []);
        assert_eq!(parser.push("s>"), [text(" <tools>")]);
    }

    proptest! {
        #[test]
        fn how_an_answer_is_cut_changes_nothing(
            words in prop::collection::vec(prop::sample::select(vec![
                "<tool_call>", "</tool_call>", "{\"name\": \"f\"}", "<tool_", "call>", " ", "\n", "é", "a", "<", "{\"name\"", ": 1}",
            ]), 0..12),
            cuts in prop::collection::vec(0usize..200, 0..8),
        ) {
            let answer = words.concat();
            let starts: Vec<usize> = answer.char_indices().map(|(start, _)| start).chain([answer.len()]).collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| starts[cut % starts.len()]).collect();
            cuts.extend([0, answer.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|cut| &answer[cut[0]..cut[1]]).collect();
            prop_assert_eq!(parse(&pieces), parse(&[&answer]));
        }
    }
}
