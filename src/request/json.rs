//! JSON text to a value, with no field twice.
//!
//! JSON leaves open what an object with two fields of one name means, and readers differ: serde_json takes the last,
//! others the first. A proxy or a filter before this program would then see another request than it does. So a
//! field that stands twice, at any depth, is an error that names it.

use super::{Rejection, RejectionCode};
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::cell::RefCell;
use std::fmt;

use super::fields::{invalid_json, shorten};

/// Reads a value from text, of which `skipped_bytes` stand before it on its line.
///
/// # Errors
/// A [`Rejection`] of text that is no JSON, or has a field twice.
pub(super) fn parse(bytes: &[u8], skipped_bytes: usize) -> Result<Value, Rejection> {
    let twice = RefCell::new(None);
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let place = Place {
        parent: None,
        step: Step::Root,
        twice: &twice,
    };
    let value = place.deserialize(&mut reader);
    let value = value.and_then(|value| reader.end().map(|()| value));
    let value = value.map_err(|error| invalid_json(&error, skipped_bytes))?;
    match twice.into_inner() {
        None => Ok(value),
        Some(field) => Err(Rejection::of_field(
            RejectionCode::InvalidValue,
            &field,
            format!("`{field}` stands there twice; expected once"),
        )),
    }
}

/// Where in the text a value stands.
struct Place<'p> {
    parent: Option<&'p Place<'p>>,
    step: Step<'p>,
    /// The first field that was found twice.
    twice: &'p RefCell<Option<String>>,
}

#[derive(Clone, Copy)]
enum Step<'p> {
    Root,
    Field(&'p str),
    Item(usize),
}

impl<'p> Place<'p> {
    fn below(&'p self, step: Step<'p>) -> Place<'p> {
        Place {
            parent: Some(self),
            step,
            twice: self.twice,
        }
    }

    /// As in `messages[0].content`.
    fn path(&self) -> String {
        let before = self.parent.map(Place::path).unwrap_or_default();
        match self.step {
            Step::Root => before,
            Step::Item(index) => format!("{before}[{index}]"),
            Step::Field(name) if before.is_empty() => shorten(name),
            Step::Field(name) => format!("{before}.{}", shorten(name)),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Place<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Place<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        let number = Number::from_f64(value);
        number
            .map(Value::Number)
            .ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(self.below(Step::Item(array.len())))? {
            array.push(item);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = fields.next_key::<String>()? {
            let place = self.below(Step::Field(&name));
            if object.contains_key(&name) && self.twice.borrow().is_none() {
                *self.twice.borrow_mut() = Some(shorten(&place.path()));
            }
            let value = fields.next_value_seed(place)?;
            object.insert(name, value);
        }
        Ok(Value::Object(object))
    }
}
