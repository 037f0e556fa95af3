//! What people write is text, also where it looks like a control token.
//!
//! A chat template writes control tokens such as `<|im_end|>` around what was said, and its output becomes tokens as one
//! text; a message that holds the same characters could so end itself and speak as somebody else. A mark is put into
//! every such place before the template is rendered, and the output is cut at the marks: no part has the whole token's text any
//! more. Conversations without such a place, which are nearly all, become tokens as one text.

use crate::request::{Chat, Message};
use serde_json::{Map, Value};

/// Characters that no text has: Unicode keeps them for a program's own use.
const MARKS: std::ops::RangeInclusive<char> = '\u{FDD0}'..='\u{FDEF}';

/// A conversation with marks in it.
pub(super) struct Marked {
    pub(super) chat: Chat,
    /// Stands nowhere else.
    pub(super) mark: char,
}

/// Marks every place where somebody wrote one of `tokens`; `None` where nobody did.
///
/// # Errors
/// All possible marks stand in the conversation.
pub(super) fn mark(chat: &Chat, tokens: &[String]) -> Result<Option<Marked>, &'static str> {
    if !has_text(chat, |text| starts(text, tokens).next().is_some()) {
        return Ok(None);
    }
    let mark = MARKS
        .into_iter()
        .find(|&mark| !has_text(chat, |text| text.contains(mark)));
    let mark = mark.ok_or(
        "the messages hold control tokens as text, and every character that could keep them apart",
    )?;
    let chat = texts_mapped(chat, &mut |text| {
        let mut marked = String::with_capacity(text.len());
        let mut done = 0;
        for start in starts(text, tokens) {
            // Behind the first character.
            let end = start + text[start..].chars().next().map_or(0, char::len_utf8);
            marked.push_str(&text[done..end]);
            marked.push(mark);
            done = end;
        }
        marked.push_str(&text[done..]);
        marked
    });
    Ok(Some(Marked { chat, mark }))
}

/// Where tokens begin in a text; they may overlap.
fn starts<'t>(text: &'t str, tokens: &'t [String]) -> impl Iterator<Item = usize> + 't {
    // Mostly one character for all tokens, so that a text of megabytes is not compared with hundreds of them at each place.
    let mut first: Vec<char> = tokens
        .iter()
        .filter_map(|token| token.chars().next())
        .collect();
    first.sort_unstable();
    first.dedup();
    let may_begin = move |&(at, character): &(usize, char)| {
        let rest = &text[at..];
        first.contains(&character) && tokens.iter().any(|token| rest.starts_with(token.as_str()))
    };
    text.char_indices().filter(may_begin).map(|(at, _)| at)
}

/// Whether there is such a text among those that people wrote.
fn has_text(chat: &Chat, is_such: impl Fn(&str) -> bool) -> bool {
    let mut found = false;
    texts_mapped(chat, &mut |text| {
        found = found || is_such(text);
        String::new()
    });
    found
}

/// The conversation with all that people wrote in it changed, names of fields too.
fn texts_mapped(chat: &Chat, change: &mut impl FnMut(&str) -> String) -> Chat {
    let mut messages = Vec::new();
    for message in &chat.messages {
        messages.push(Message {
            role: message.role,
            content: message.content.as_deref().map(&mut *change),
            more: object_mapped(&message.more, change),
        });
    }
    let mut tools = Vec::new();
    for tool in &chat.tools {
        tools.push(value_mapped(tool, change));
    }
    Chat {
        messages,
        tools,
        template_arguments: object_mapped(&chat.template_arguments, change),
    }
}

fn object_mapped(
    object: &Map<String, Value>,
    change: &mut impl FnMut(&str) -> String,
) -> Map<String, Value> {
    let mut mapped = Map::new();
    for (name, value) in object {
        mapped.insert(change(name), value_mapped(value, change));
    }
    mapped
}

fn value_mapped(value: &Value, change: &mut impl FnMut(&str) -> String) -> Value {
    match value {
        Value::String(text) => Value::String(change(text)),
        Value::Array(items) => {
            let mut mapped = Vec::new();
            for item in items {
                mapped.push(value_mapped(item, change));
            }
            Value::Array(mapped)
        }
        Value::Object(object) => Value::Object(object_mapped(object, change)),
        other => other.clone(),
    }
}
