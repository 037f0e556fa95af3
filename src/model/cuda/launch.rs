//! The kernels of a step in their order.

use super::load::Layer;
use super::step::Numbers;
use super::{CudaEngine, Shape};
use anyhow::{Context, Result};
use mlx_pipe_cuda::{
    AttendWork, Buffer, DecodeWork, Epilogue, Input, LayerOperands, Normed, Pools, Rotation, Tiles,
};

impl CudaEngine {
    /// Asks for all kernels of a step.
    pub(super) fn launch(&self, numbers: &Numbers, shape: &Shape) -> Result<()> {
        let (kernels, work, rows) = (&self.kernels, &self.work, shape.rows);
        if shape.tokens > 0 {
            kernels.look_up(self.table()?, work.numbers(&numbers.tokens), &work.x)?;
        }
        // Steps of one token are computed by a kernel of all layers, where there is one.
        if rows == 1 && kernels.can_decode() && self.used > 0 {
            self.launch_decode(numbers)?;
        } else {
            for (layer, pools) in self.layers[..self.used].iter().zip(&self.pools) {
                self.launch_layer(layer, pools, numbers, rows)?;
            }
        }
        if shape.is_for_head && shape.wanted > 0 {
            let head = self.head.as_ref().context("this stage has no head")?;
            let (projection, wanted) = (self.projection(head)?, shape.wanted);
            let rows = work.numbers(&numbers.wanted);
            kernels.linear(
                projection,
                self.normed(&head.norm, Some(rows)),
                wanted,
                Epilogue::Plain,
                &work.logits,
                true,
            )?;
            let widths = [head.vocab_size, projection.outputs];
            kernels.best(&work.logits, wanted, widths, &work.best_work, &work.best)?;
        }
        Ok(())
    }

    /// The rows of `x`, normed.
    fn normed<'a>(
        &'a self,
        weight: &'a Buffer,
        rows: Option<mlx_pipe_cuda::Numbers<'a>>,
    ) -> Input<'a> {
        Input::Normed(Normed {
            x: &self.work.x,
            weight,
            eps: self.eps,
            rows,
            into: &self.work.normed,
        })
    }

    fn rotation<'a>(&'a self, layer: &'a Layer, numbers: &Numbers) -> Rotation<'a> {
        Rotation {
            norms: layer.qk_norm.as_ref().map(|(q, k)| (q, k)),
            eps: self.eps,
            frequencies: &self.frequencies,
            places: self.work.numbers(&numbers.places),
        }
    }

    fn tiles(&self, numbers: &Numbers) -> Tiles<'_> {
        Tiles {
            few: self.work.numbers(&numbers.few),
            many: self.work.numbers(&numbers.many),
            table: self.work.numbers(&numbers.table),
            parts: numbers.parts,
            few_tokens: numbers.few_tokens,
        }
    }

    fn attend_work(&self) -> AttendWork<'_> {
        AttendWork {
            partial: &self.work.partial,
            arrived: &self.work.arrived,
        }
    }

    /// Asks for all layers of a step of one token.
    fn launch_decode(&self, numbers: &Numbers) -> Result<()> {
        let work = &self.work;
        let layers: Vec<LayerOperands> = self.layers[..self.used]
            .iter()
            .zip(&self.pools)
            .map(|(layer, pools)| LayerOperands {
                weights: [
                    &layer.qkv_proj,
                    &layer.o_proj,
                    &layer.gate_up_proj,
                    &layer.down_proj,
                ],
                norms: [&layer.input_layernorm, &layer.post_attention_layernorm],
                qk_norms: layer.qk_norm.as_ref().map(|(q, k)| (q, k)),
                pools,
            })
            .collect();
        let rotation = self.rotation(&self.layers[0], numbers);
        let decode_work = DecodeWork {
            x: &work.x,
            qkv: &work.qkv,
            attended: &work.attended,
            mlp: &work.mlp,
            attend: self.attend_work(),
            progress: &work.progress,
        };
        let tiles = self.tiles(numbers);
        self.kernels.decode(&layers, rotation, tiles, decode_work)
    }

    /// Asks for the kernels of one layer.
    fn launch_layer(
        &self,
        layer: &Layer,
        pools: &Pools,
        numbers: &Numbers,
        rows: usize,
    ) -> Result<()> {
        let (kernels, work) = (&self.kernels, &self.work);
        let linear = |weight, input, epilogue, out| {
            kernels.linear(weight, input, rows, epilogue, out, false)
        };
        let normed = self.normed(&layer.input_layernorm, None);
        linear(&layer.qkv_proj, normed, Epilogue::Plain, &work.qkv)?;
        let rotation = self.rotation(layer, numbers);
        kernels.rotate(&work.qkv, rotation, &work.queries, pools, rows)?;
        kernels.attend(
            &work.queries,
            pools,
            self.tiles(numbers),
            self.attend_work(),
            &work.attended,
            rows,
        )?;
        let attended = Input::Plain(&work.attended);
        linear(&layer.o_proj, attended, Epilogue::Add(&work.x), &work.x)?;
        let normed = self.normed(&layer.post_attention_layernorm, None);
        linear(&layer.gate_up_proj, normed, Epilogue::Gated, &work.mlp)?;
        let mlp = Input::Plain(&work.mlp);
        linear(&layer.down_proj, mlp, Epilogue::Add(&work.x), &work.x)
    }
}
