//! Messages, tools and what a chat template is given: of a body for chat completions.

use super::fields::{
    Fields, found, is_empty_array, missing, shorten, string, wrong_type, wrong_value,
};
use super::{Chat, Message, Rejection, RejectionCode, Role};
use serde_json::{Map, Value};

pub(super) fn chat(fields: &mut Fields) -> Result<Chat, Rejection> {
    let messages = match fields.required("messages")? {
        Value::Array(items) if items.is_empty() => {
            return Err(wrong_value(
                "messages",
                "at least one message",
                &Value::Array(items),
            ));
        }
        Value::Array(items) => items,
        other => return Err(wrong_type("messages", "an array of messages", &other)),
    };
    let messages = messages.into_iter().enumerate();
    Ok(Chat {
        messages: messages
            .map(|(i, item)| message(&format!("messages[{i}]"), item))
            .collect::<Result<_, _>>()?,
        tools: tools(fields)?,
        template_arguments: template_arguments(fields)?,
    })
}

/// The tools that may be called: none if `tool_choice` says so.
fn tools(fields: &mut Fields) -> Result<Vec<Value>, Rejection> {
    let unsupported = |field: &str, message: String| {
        Err(Rejection::of_field(
            RejectionCode::UnsupportedField,
            field,
            message,
        ))
    };
    let tools = match fields.take("tools") {
        None => Vec::new(),
        Some(Value::Array(tools)) => tools,
        Some(other) => return Err(wrong_type("tools", "an array of tools", &other)),
    };
    for (i, tool) in tools.iter().enumerate() {
        let at = format!("tools[{i}]");
        match tool.get("type").and_then(Value::as_str) {
            Some("function") => {}
            Some(other) => {
                let found = shorten(other);
                return unsupported(
                    &at,
                    format!("`{at}` must be of type \"function\", found {found:?}"),
                );
            }
            None => {
                return Err(wrong_type(
                    &at,
                    "an object with `type` and `function`",
                    tool,
                ));
            }
        }
        let name = tool
            .get("function")
            .and_then(|function| function.get("name"));
        if !name.is_some_and(Value::is_string) {
            return Err(missing(
                &format!("{at}.function.name"),
                &format!("`{at}.function.name` must be a string"),
            ));
        }
    }
    let parallel = fields.boolean("parallel_tool_calls")?;
    if parallel == Some(false) && !tools.is_empty() {
        let message = "`parallel_tool_calls` cannot be false: nothing keeps the model to one call; leave it out";
        return unsupported("parallel_tool_calls", message.into());
    }
    match fields.take("tool_choice") {
        None => Ok(tools),
        Some(Value::String(choice)) if choice == "auto" => Ok(tools),
        Some(Value::String(choice)) if choice == "none" => Ok(Vec::new()),
        Some(other) => unsupported(
            "tool_choice",
            format!(
                "`tool_choice` must be \"auto\" or \"none\": nothing makes the model call a tool; found {}",
                found(&other)
            ),
        ),
    }
}

/// Variables for the template. Those that the program itself sets are not the caller's to change.
fn template_arguments(fields: &mut Fields) -> Result<Map<String, Value>, Rejection> {
    const OURS: [&str; 4] = ["messages", "add_generation_prompt", "tools", "documents"];
    let arguments = match fields.take("chat_template_kwargs") {
        None => return Ok(Map::new()),
        Some(Value::Object(arguments)) => arguments,
        Some(other) => return Err(wrong_type("chat_template_kwargs", "an object", &other)),
    };
    match OURS.into_iter().find(|name| arguments.contains_key(*name)) {
        None => Ok(arguments),
        Some(name) => {
            let field = format!("chat_template_kwargs.{name}");
            let message = format!("`{field}` cannot be set; leave it out");
            Err(Rejection::of_field(
                RejectionCode::UnsupportedField,
                &field,
                message,
            ))
        }
    }
}

fn message(at: &str, item: Value) -> Result<Message, Rejection> {
    let Value::Object(mut fields) = item else {
        return Err(wrong_type(at, "an object with `role` and `content`", &item));
    };
    let role = role(&format!("{at}.role"), fields.remove("role"))?;
    let content = fields
        .remove("content")
        .filter(|content| !content.is_null());
    // SDKs write out every optional field as null; a template asks whether a field is there at all.
    fields.retain(|_, value| !value.is_null());
    let calls_tools = fields
        .get("tool_calls")
        .is_some_and(|calls| !is_empty_array(calls));
    if let Some(Value::Array(calls)) = fields.get_mut("tool_calls") {
        calls.iter_mut().for_each(parse_arguments);
    }
    let content = match content {
        Some(content) => Some(text_of(&format!("{at}.content"), content)?),
        None if role == Role::Assistant && calls_tools => None,
        None => {
            return Err(missing(
                &format!("{at}.content"),
                &format!("`{at}.content` is missing"),
            ));
        }
    };
    Ok(Message {
        role,
        content,
        more: fields,
    })
}

/// Clients send the arguments of a call as the text of an object; templates expect the object.
fn parse_arguments(call: &mut Value) {
    let Some(arguments) = call.pointer_mut("/function/arguments") else {
        return;
    };
    let parsed = arguments
        .as_str()
        .and_then(|text| serde_json::from_str::<Map<_, _>>(text).ok());
    if let Some(parsed) = parsed {
        *arguments = Value::Object(parsed);
    }
}

fn role(at: &str, value: Option<Value>) -> Result<Role, Rejection> {
    let value = value.ok_or_else(|| missing(at, &format!("`{at}` is missing")))?;
    match value.as_str() {
        Some("system") => Ok(Role::System),
        Some("developer") => Ok(Role::Developer),
        Some("user") => Ok(Role::User),
        Some("assistant") => Ok(Role::Assistant),
        Some("tool") => Ok(Role::Tool),
        Some(_) => Err(wrong_value(
            at,
            "system, developer, user, assistant or tool",
            &value,
        )),
        None => Err(wrong_type(at, "a string", &value)),
    }
}

/// The text of a message: a string, or an array of text parts, which are joined without anything between them.
fn text_of(at: &str, content: Value) -> Result<String, Rejection> {
    match content {
        Value::String(text) => Ok(text),
        Value::Array(parts) => parts
            .into_iter()
            .enumerate()
            .map(|(i, part)| text_of_part(&format!("{at}[{i}]"), part))
            .collect(),
        other => Err(wrong_type(at, "a string or an array of text parts", &other)),
    }
}

fn text_of_part(at: &str, part: Value) -> Result<String, Rejection> {
    let Value::Object(fields) = part else {
        return Err(wrong_type(at, "an object with `type` and `text`", &part));
    };
    let mut fields = Fields(fields);
    let kind = fields
        .take("type")
        .ok_or_else(|| missing(at, &format!("`{at}.type` is missing")))?;
    match kind.as_str() {
        Some("text") => string(
            &format!("{at}.text"),
            fields.take("text").unwrap_or(Value::Null),
        ),
        _ => Err(Rejection::of_field(
            RejectionCode::UnsupportedField,
            at,
            format!(
                "`{at}` must be a part of type \"text\", found type {}",
                found(&kind)
            ),
        )),
    }
}
